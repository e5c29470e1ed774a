/** The page: sends requests, shows their answers, and re-weighs them as the settings beside them move. */

import { Legend } from "./answer.js";
import { Candidates } from "./candidates.js";
import { Curve } from "./curve.js";
import { Form } from "./form.js";
import { Header, Terms } from "./frame.js";
import { Lines, Pane, taskFor, UNIT, useAnswer } from "./panes.js";
import { DEFAULTS, describeServer, newRun, reduce, start } from "./runs.js";
import { EXAMPLES } from "./tasks.js";
import { Tree } from "./tree.js";
import { html, render, useEffect, useMemo, useReducer, useRef, useState } from "./ui.js";
import { PathChance, WhatIf } from "./what_if.js";

function App() {
  const [server, setServer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [settings, setSettings] = useState(DEFAULTS);
  const [runs, dispatch] = useReducer(reduce, []);
  const [shown, setShown] = useState(null);
  const [beside, setBeside] = useState(null);
  const [selected, setSelected] = useState(0);
  const [focused, setFocused] = useState("shown"); // whose token's candidates are shown
  const [whatIf, setWhatIf] = useState(DEFAULTS);
  const [colour, setColour] = useState("kl");
  const [busy, setBusy] = useState(false);
  const abort = useRef(null);

  const change = (some) => setSettings((before) => ({ ...before, ...some }));
  const connect = async () => {
    try {
      const found = await describeServer();
      setServer(found);
      setProblem(null);
      const critic =
        found.critics.find(({ first }) => first) ?? found.critics.find(({ active }) => active) ?? found.critics[0];
      const example = EXAMPLES.find(({ fits }) => fits.test(found.models[0] ?? ""));
      setSettings((before) => ({
        ...(before.model
          ? before
          : { ...before, ...example.fields, eta: critic?.card.recommended_eta ?? DEFAULTS.eta }),
        model: found.models.includes(before.model) ? before.model : (found.models[0] ?? ""),
        critic: found.critics.some(({ id }) => id === before.critic) ? before.critic : (critic?.id ?? ""),
      }));
    } catch (error) {
      setProblem(error);
    }
  };
  useEffect(() => {
    connect();
  }, []);

  const send = async (from = null) => {
    const run = newRun(from ? { ...from.run.settings, n: 1 } : settings, from);
    abort.current?.abort();
    abort.current = new AbortController();
    const { signal } = abort.current;
    setProblem(null);
    setBusy(true);
    setShown({ run: run.id, side: "guided", choice: 0 });
    setBeside(run.plain ? { run: run.id, side: "plain", choice: 0 } : null);
    setSelected(from ? from.at : 0);
    setFocused("shown");
    if (!from) setWhatIf(run.settings);
    if (matchMedia("(max-width: 62rem)").matches) document.getElementById("answers").scrollIntoView(); // below the form
    await start(run, dispatch, signal);
    if (!signal.aborted) setBusy(false);
  };
  const stop = () => {
    abort.current?.abort();
    setBusy(false);
  };

  const main = useAnswer(runs, shown, whatIf);
  const other = useAnswer(runs, beside, whatIf);
  const looked = focused === "beside" && other?.path ? other : main;
  const place = looked?.path ? Math.min(selected, looked.path.length - 1) : null;
  const failed = problem ?? main?.run.guided.error ?? null;
  const choose = (which, set) => (choice) => set({ ...which, choice });
  const select = (which) => (i) => {
    setSelected(i);
    setFocused(which);
  };
  const range = looked?.range ?? UNIT;

  // What the what-if settings do not change is not drawn again while they move.
  const [keyWanted, wrong] = [failed?.status === 401, failed?.param ?? null];
  const header = useMemo(
    () => html`<${Header} server=${server} onKey=${connect} keyWanted=${keyWanted} />`,
    [server, keyWanted],
  );
  const form = useMemo(
    () =>
      html`<${Form}
        settings=${settings}
        server=${server}
        busy=${busy}
        wrong=${wrong}
        onChange=${change}
        onSend=${() => send()}
        onStop=${stop}
      />`,
    [settings, server, busy, wrong],
  );
  const tree = useMemo(
    () =>
      html`<${Tree}
        runs=${runs}
        taskFor=${taskFor}
        shown=${shown}
        beside=${beside}
        onShow=${setShown}
        onBeside=${(where) => setBeside((before) => (JSON.stringify(before) === JSON.stringify(where) ? null : where))}
      />`,
    [runs, shown, beside],
  );
  const curve = useMemo(
    () => server && settings.critic && html`<${Curve} settings=${settings} range=${range} onError=${setProblem} />`,
    [settings, server, range[0], range[1]],
  );

  return html`
    <a class="skip" href="#answers">To the answers</a>
    ${header}
    <div class="page">
      <aside aria-label="Request">${form}</aside>
      <main id="answers" tabindex="-1">
        ${
          problem &&
          html`<p class="error" role="alert">
            ${problem.message} <button class="small" onClick=${connect}>Try again</button>
          </p>`
        }
        ${
          server?.critics.length === 0 &&
          html`<p class="error" role="alert">No critic is loaded, so answers cannot be guided yet.</p>`
        }
        <${Terms} open=${!main} />
        ${
          main &&
          html`
            ${
              main.path &&
              main.guidance.distribution &&
              html`<${WhatIf}
                settings=${whatIf}
                sent=${main.run.settings}
                onChange=${(some) => setWhatIf((before) => ({ ...before, ...some }))}
              />`
            }
            <div class="row">
              <fieldset class="row">
                <legend class="unseen">Colour tokens by</legend>
                ${[
                  ["kl", "KL"],
                  ["value", "Value"],
                ].map(
                  ([key, label]) =>
                    html`<label class="check"
                      ><input type="radio" name="colour" checked=${colour === key} onChange=${() => setColour(key)} />
                      ${label}</label
                    >`,
                )}
              </fieldset>
              <${Legend} colour=${colour} range=${range} />
            </div>
            <div class="panes">
              <${Pane}
                name="shown"
                answer=${main}
                colour=${colour}
                selected=${selected}
                onSelect=${select("shown")}
                onChoose=${choose(shown, setShown)}
              />
              ${
                other &&
                html`<${Pane}
                  name="beside"
                  answer=${other}
                  told=${main.run.guided.error?.message}
                  colour=${colour}
                  selected=${selected}
                  onSelect=${select("beside")}
                  onChoose=${choose(beside, setBeside)}
                />`
              }
            </div>
            ${
              looked?.path &&
              html`<${Lines}
                shown=${main}
                beside=${other}
                range=${range}
                selected=${place}
                onSelect=${select(focused)}
              />`
            }
            ${
              place !== null &&
              html`<section class="card" aria-label="Candidates of the chosen token">
                <${Candidates}
                  token=${looked.path[place]}
                  step=${looked.steps[place]}
                  place=${place}
                  distribution=${looked.guidance.distribution}
                  onBranch=${(tokenId, text) => send({ ...looked.where, run: looked.run, at: place, tokenId, text })}
                />
              </section>`
            }
            ${
              looked?.path &&
              html`<${PathChance} answer=${looked} settings=${whatIf} upTo=${place} onUpTo=${select(focused)} />`
            }
            ${tree}
          `
        }
        ${curve}
      </main>
    </div>
  `;
}

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
