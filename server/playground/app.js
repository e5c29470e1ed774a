/** The page: sends requests, shows their answers, and re-weighs them as the settings beside them move. */

import { savedKey, saveKey } from "./api.js";
import { Figures, Legend, Tokens } from "./answer.js";
import { Candidates } from "./candidates.js";
import { EtaLine, TokenLines } from "./charts.js";
import { Curve } from "./curve.js";
import { Choice, Eta, Form, METHODS, TAILS } from "./form.js";
import { chance, compared, short } from "./format.js";
import { StarGraph } from "./graph.js";
import { budgetOf, DEFAULTS, describeServer, newRun, pathOf, reduce, start, textOf } from "./runs.js";
import { EXAMPLES, taskOf } from "./tasks.js";
import { Tree } from "./tree.js";
import { html, render, useEffect, useMemo, useReducer, useRef, useState } from "./ui.js";
import { reweigh } from "./weighting.js";

const UNIT = [0, 1];
const ETAS = Array.from({ length: 31 }, (_, i) => 10 ** (-2 + i / 10));

/** All that follows from an answer under some settings; null where it has not ended or is not there. */
function useAnswer(runs, where, settings) {
  const run = where && runs.find((one) => one.id === where.run);
  const guidance = run?.[where.side].choices[where.choice]?.guidance ?? null;
  const path = useMemo(() => (guidance ? pathOf(run, where.side, where.choice) : null), [guidance]);
  const steps = useMemo(
    () => path && reweigh(path, guidance.distribution, settings, budgetOf(run, guidance)),
    [path, settings.eta, settings.method, settings.tail],
  );
  if (!run) return null;
  const text = textOf(run, where.side, where.choice);
  return { run, where, path, steps, guidance, text, range: guidance?.distribution?.reward_range ?? UNIT };
}

const taskFor = (run) => (run.settings.mode === "text" ? taskOf(run.settings.prompt) : null);

function Pane({ name, answer, colour, selected, onSelect, onChoose }) {
  const { run, where, path, steps, text, range } = answer;
  const side = run[where.side];
  const task = taskFor(run);
  const reward = task && path ? task.reward(text) : null;
  const guided = where.side === "guided" && run.settings.critic !== "";
  return html`<section class="card pane" aria-labelledby=${`${name}-title`}>
    <div class="row">
      <h2 id=${`${name}-title`}>${guided ? "Guided" : "The model by itself"}</h2>
      ${side.choices.length > 1 &&
      html`<div class="choices" role="group" aria-label="Answers">
        ${side.choices.map((_, i) => {
          const done = pathOf(run, where.side, i);
          const mark = task && done ? (task.reward(textOf(run, where.side, i)) ? "✓" : "✗") : "";
          return html`<button class="small" aria-pressed=${i === where.choice} onClick=${() => onChoose(i)}>${i + 1} ${mark}</button>`;
        })}
      </div>`}
      ${!side.done && html`<span class="busy">sampling…</span>`}
    </div>
    ${side.error && html`<p class="error" role="alert">${side.error.message}</p>`}
    <${Tokens} id=${name} label=${guided ? "Guided answer" : "Answer of the model by itself"} path=${path} steps=${steps}
      text=${text} colour=${colour} range=${range} selected=${path ? Math.min(selected, path.length - 1) : null} onSelect=${onSelect} />
    <${Figures} path=${path} steps=${steps} reward=${reward} guided=${guided} />
    ${task?.graph && path && html`<${StarGraph} graph=${task.graph} text=${text} />`}
  </section>`;
}

/** Value and KL along the answers that are shown. */
function Lines({ shown, beside, range, selected, onSelect }) {
  const lines = (measure) =>
    [
      shown.path && { name: "shown", kind: "guided", values: shown.steps.map(measure) },
      beside?.path && { name: "beside it", kind: "reference", values: beside.steps.map(measure) },
    ].filter(Boolean);
  const values = lines((step) => step.value);
  const kls = lines((step) => (step.guided ? step.kl : null));
  const most = Math.max(...kls.flatMap((line) => line.values), 0.1);
  return html`<section class="card" aria-labelledby="lines-title">
    <div class="row">
      <h2 id="lines-title">Token by token</h2>
      <p class="keys">
        ${shown.path && html`<span class="key guided"></span> left text`}
        ${beside?.path && html`<span class="key reference"></span> right text`}
      </p>
    </div>
    <div class="pairs">
      <${TokenLines} series=${values} range=${range} selected=${selected} onSelect=${onSelect} yLabel="value, in units of reward" />
      <${TokenLines} series=${kls} range=${[0, most]} selected=${selected} onSelect=${onSelect} yLabel="KL, in nats" />
    </div>
  </section>`;
}

/** What another eta, method or tail would have made of the answers that are shown. */
function WhatIf({ settings, sent, onChange }) {
  const changed = ["eta", "method", "tail"].some((name) => settings[name] !== sent[name]);
  return html`<section class="card" aria-labelledby="what-if-title">
    <h2 id="what-if-title">What if?</h2>
    <p class="hint" id="about-what-if">
      Weighs the answers below anew, at once and without the server: the critic's opinion does not depend on eta.
    </p>
    <div class="grid wide">
      <${Eta} id="what-if-eta" eta=${settings.eta} describedBy="about-what-if" onChange=${(eta) => onChange({ eta })} />
      <${Choice} label="Method" value=${settings.method} options=${METHODS} onChange=${(method) => onChange({ method })} />
      <${Choice} label="All other tokens" value=${settings.tail} options=${TAILS} onChange=${(tail) => onChange({ tail })} />
    </div>
    <div class="row">
      <button class="small" disabled=${!changed} onClick=${() => onChange(sent)}>Back to what was sent</button>
      <small class="hint">${changed ? `Sampled with eta ${short(sent.eta)}; shown as eta ${short(settings.eta)} would weigh it.` : "Shown as it was sampled."}</small>
    </div>
  </section>`;
}

/** How probable the shown answer, or its beginning, would have been. */
function PathChance({ answer, settings, upTo, onUpTo }) {
  const { run, path, steps, guidance } = answer;
  const [curves, setCurves] = useState(null);
  useEffect(() => {
    setCurves(null);
    const later = setTimeout(() => {
      setCurves(
        ETAS.map((eta) => {
          let total = 0;
          return reweigh(path, guidance.distribution, { ...settings, eta }, budgetOf(run, guidance)).map((step) => (total += step.logprob));
        }),
      );
    }, 150);
    return () => clearTimeout(later);
  }, [path, settings.method, settings.tail]);
  const before = (values) => values.slice(0, upTo + 1).reduce((a, b) => a + b, 0);
  const reference = before(path.map((token) => token.ref_logprob));
  const guided = before(steps.map((step) => step.logprob));
  const whole = upTo === path.length - 1;
  return html`<section class="card" aria-labelledby="path-title">
    <h2 id="path-title">How likely was this answer?</h2>
    <label class="field">
      <span>${whole ? `The whole answer, ${path.length} tokens` : `Its first ${upTo + 1} of ${path.length} tokens`}</span>
      <input type="range" min="1" max=${path.length} step="1" value=${upTo + 1} aria-label="How many of its tokens"
        onInput=${(event) => onUpTo(Number(event.target.value) - 1)} />
    </label>
    <p>
      The model by itself: <b>${chance(reference)}</b>. Guided at eta ${short(settings.eta)}: <b>${chance(guided)}</b>,
      ${" "}${compared(guided - reference)}.
    </p>
    ${curves &&
    html`<${EtaLine} points=${ETAS.map((eta, i) => [eta, curves[i][upTo] / Math.LN10])} base=${reference / Math.LN10}
      marked=${settings.eta} yLabel="log10 of the probability (grey: the model by itself)"
      label="Probability of this answer over eta" />`}
  </section>`;
}

function Header({ server, onKey, keyWanted }) {
  const [key, setKey] = useState(savedKey());
  const entered = (event) => {
    event.preventDefault();
    saveKey(key.trim());
    onKey();
  };
  return html`<header>
    <h1>Playground</h1>
    <span class="served">${server?.models.join(", ") ?? ""}</span>
    <form class="row" onSubmit=${entered}>
      <label for="key">Key</label>
      <input id="key" type="password" autocomplete="off" value=${key} aria-invalid=${keyWanted}
        placeholder=${keyWanted ? "wanted" : "none needed"} onInput=${(event) => setKey(event.target.value)} />
      <button class="small">Use</button>
    </form>
    <nav aria-label="Elsewhere"><a href="../docs">API</a></nav>
  </header>`;
}

function Terms() {
  return html`<section class="card terms" aria-labelledby="terms-title">
    <h2 id="terms-title">What you see</h2>
    <dl>
      <dt>Critic</dt>
      <dd>A small model that has learned which answers earn a reward. At each token it says how much reward to expect after each candidate.</dd>
      <dt>eta</dt>
      <dd>How strongly the critic may steer. A candidate that is better by one eta of reward becomes about e ≈ 2.7 times as likely.</dd>
      <dt>KL</dt>
      <dd>What that costs: how far the guided choice is from the model's own, in nats. 0 is the model itself. At a KL of 1 guidance has made what it drew 2.7 times as likely, on average; of 2, 7.4 times.</dd>
      <dt>Value</dt>
      <dd>What the critic expects of the rest: the reward, less eta for each nat of KL still to be spent. It rises when a good token is drawn.</dd>
    </dl>
  </section>`;
}

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
      const critic = found.critics.find(({ first }) => first) ?? found.critics.find(({ active }) => active) ?? found.critics[0];
      const example = EXAMPLES.find(({ fits }) => fits.test(found.models[0] ?? ""));
      setSettings((before) => ({
        ...(before.model ? before : { ...before, ...example.fields, eta: critic?.card.recommended_eta ?? DEFAULTS.eta }),
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
  const header = useMemo(() => html`<${Header} server=${server} onKey=${connect} keyWanted=${keyWanted} />`, [server, keyWanted]);
  const form = useMemo(
    () => html`<${Form} settings=${settings} server=${server} busy=${busy} wrong=${wrong} onChange=${change}
      onSend=${() => send()} onStop=${stop} />`,
    [settings, server, busy, wrong],
  );
  const tree = useMemo(
    () => html`<${Tree} runs=${runs} taskFor=${taskFor} shown=${shown} beside=${beside} onShow=${setShown}
      onBeside=${(where) => setBeside((before) => (JSON.stringify(before) === JSON.stringify(where) ? null : where))} />`,
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
        ${problem && html`<p class="error" role="alert">${problem.message}
          <button class="small" onClick=${connect}>Try again</button></p>`}
        ${server && !server.critics.length && html`<p class="error" role="alert">No critic is loaded, so answers cannot be guided yet.</p>`}
        ${!main && html`<${Terms} />`}
        ${main &&
        html`
          ${main.path && main.guidance.distribution && html`<${WhatIf} settings=${whatIf} sent=${main.run.settings}
            onChange=${(some) => setWhatIf((before) => ({ ...before, ...some }))} />`}
          <div class="row">
            <fieldset class="row">
              <legend class="unseen">Colour tokens by</legend>
              ${[["kl", "KL"], ["value", "Value"]].map(
                ([key, label]) => html`<label class="check"><input type="radio" name="colour" checked=${colour === key}
                  onChange=${() => setColour(key)} /> ${label}</label>`,
              )}
            </fieldset>
            <${Legend} colour=${colour} range=${range} />
          </div>
          <div class="panes">
            <${Pane} name="shown" answer=${main} colour=${colour} selected=${selected} onSelect=${select("shown")} onChoose=${choose(shown, setShown)} />
            ${other && html`<${Pane} name="beside" answer=${other} colour=${colour} selected=${selected} onSelect=${select("beside")} onChoose=${choose(beside, setBeside)} />`}
          </div>
          ${looked?.path && html`<${Lines} shown=${main} beside=${other} range=${range} selected=${place} onSelect=${select(focused)} />`}
          ${place !== null &&
          html`<section class="card" aria-label="Candidates of the chosen token">
            <${Candidates} token=${looked.path[place]} step=${looked.steps[place]} place=${place} distribution=${looked.guidance.distribution}
              onBranch=${(tokenId, text) => send({ ...looked.where, run: looked.run, at: place, tokenId, text })} />
          </section>`}
          ${looked?.path && html`<${PathChance} answer=${looked} settings=${whatIf} upTo=${place} onUpTo=${select(focused)} />`}
          ${tree}
        `}
        ${curve}
        ${main && html`<${Terms} />`}
      </main>
    </div>
  `;
}

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
