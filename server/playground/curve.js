/** Reward against KL over eta: samples one prompt under several etas, and draws what they earn as they arrive. */

import { json } from "./api.js";
import { Points } from "./charts.js";
import { mean, short, standardError } from "./format.js";
import { requestOf } from "./runs.js";
import { taskOf } from "./tasks.js";
import { html, useRef, useState } from "./ui.js";
import { expectedReward } from "./weighting.js";

const ETAS = [null, 3, 1, 0.3, 0.1, 0.03]; // null: the model by itself
const AT_ONCE = 4;

/** Rewards and KLs of some more answers under one eta. */
async function sampled(settings, eta, seed, signal) {
  const task = settings.mode === "text" ? taskOf(settings.prompt) : null;
  const side = eta === null ? "plain" : "guided";
  const [path, body] = requestOf({ ...settings, eta: eta ?? settings.eta, n: AT_ONCE, seed }, side);
  if (task) body.guidance.detail = "summary";
  const { choices } = await json(path, body, signal);
  return choices.map(({ text, guidance }) => ({
    kl: eta === null ? 0 : guidance.kl,
    reward: task ? task.reward(text) : expectedAtEnd(guidance),
  }));
}

/** What the critic expected after the last token that it was asked about; null if it never was. */
function expectedAtEnd({ tokens, distribution }) {
  for (const { token_id: id, candidates } of tokens.toReversed()) {
    const place = candidates ? candidates.token_ids.indexOf(id) : -1;
    if (place >= 0) return expectedReward(distribution, candidates.outputs[place]);
  }
  return null;
}

export function Curve({ settings, range, onError }) {
  const [samples, setSamples] = useState(null); // a list for each of ETAS
  const [wanted, setWanted] = useState(12);
  const [running, setRunning] = useState(false);
  const stop = useRef(null);
  const task = settings.mode === "text" ? taskOf(settings.prompt) : null;
  const measured = task ? "Accuracy" : "Expected reward";

  const begin = async () => {
    const abort = new AbortController();
    stop.current = abort;
    setRunning(true);
    let all = ETAS.map(() => []);
    setSamples(all);
    try {
      for (let done = 0; done < wanted; done += AT_ONCE) {
        for (const [i, eta] of ETAS.entries()) {
          const seed = 1000 + done + 100000 * i;
          const more = await sampled(settings, eta, seed, abort.signal);
          all = all.map((list, at) => (at === i ? [...list, ...more] : list));
          setSamples(all);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") onError(error);
    }
    setRunning(false);
  };

  const points = (samples ?? []).flatMap((list, i) => {
    const kls = list.map(({ kl }) => kl);
    const rewards = list.map(({ reward }) => reward).filter((reward) => reward !== null);
    if (!rewards.length) return [];
    const name = ETAS[i] === null ? "not guided" : `eta ${ETAS[i]}`;
    return [
      { x: mean(kls), y: mean(rewards), dx: standardError(kls), dy: standardError(rewards), n: list.length, name },
    ];
  });
  return html`<section aria-labelledby="curve-title" class="card">
    <h2 id="curve-title">What does guidance buy?</h2>
    <p class="hint">
      Samples this prompt anew without guidance and with ${ETAS.length - 1} values of eta. To the right: further from the
      model (KL). Up: ${task ? `more right answers (${task.name})` : "more reward, as far as the critic can tell"}. Bars
      are one standard error.
    </p>
    <div class="row">
      <label class="field inline"
        ><span>Answers for each eta</span>
        <input
          type="number"
          min=${AT_ONCE}
          max="200"
          step=${AT_ONCE}
          value=${wanted}
          onInput=${(event) => Number(event.target.value) >= 1 && setWanted(Number(event.target.value))}
        />
      </label>
      <button disabled=${running || !settings.critic} onClick=${begin}>Draw the curve</button>
      <button disabled=${!running} onClick=${() => stop.current.abort()}>Stop</button>
    </div>
    ${
      points.length > 0 &&
      html`<${Points}
          points=${points}
          range=${task ? [0, 1] : range}
          xLabel="KL, nats per answer"
          yLabel=${measured}
          label=${points.map(({ name, x, y }) => `${name}: ${short(y)} at a KL of ${short(x)}`).join("; ")}
        />
        <div class="scrolled" tabindex="0" role="region" aria-label="The curve's numbers">
          <table>
            <thead>
              <tr>
                <th scope="col">Strength</th>
                <th scope="col" class="number">${measured}</th>
                <th scope="col" class="number">KL, nats</th>
                <th scope="col" class="number">answers</th>
              </tr>
            </thead>
            <tbody>
              ${points.map(
                ({ name, x, y, dx, dy, n }) =>
                  html`<tr>
                    <th scope="row">${name}</th>
                    <td class="number">${short(y)}${dy !== null && ` ± ${short(dy)}`}</td>
                    <td class="number">${short(x)}${dx !== null && ` ± ${short(dx)}`}</td>
                    <td class="number">${n}</td>
                  </tr>`,
              )}
            </tbody>
          </table>
        </div>`
    }
  </section>`;
}
