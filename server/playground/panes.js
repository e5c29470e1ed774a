/** The answers that are shown: what follows from each, its pane, and both along their tokens. */

import { Figures, Tokens } from "./answer.js";
import { TokenLines } from "./charts.js";
import { StarGraph } from "./graph.js";
import { budgetOf, pathOf, textOf } from "./runs.js";
import { taskOf } from "./tasks.js";
import { html, useMemo } from "./ui.js";
import { reweigh } from "./weighting.js";

export const UNIT = [0, 1]; // the range of rewards where no critic says another

/** All that follows from an answer under some settings; null where it has not ended or is not there. */
export function useAnswer(runs, where, settings) {
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

export const taskFor = (run) => (run.settings.mode === "text" ? taskOf(run.settings.prompt) : null);

export function Pane({ name, answer, told, colour, selected, onSelect, onChoose }) {
  const { run, where, path, steps, text, range } = answer;
  const side = run[where.side];
  const task = taskFor(run);
  const reward = task && path ? task.reward(text) : null;
  const guided = where.side === "guided" && run.settings.critic !== "";
  return html`<section class="card pane" aria-labelledby=${`${name}-title`}>
    <div class="row">
      <h2 id=${`${name}-title`}>${guided ? "Guided" : "The model by itself"}</h2>
      ${
        side.choices.length > 1 &&
        html`<div class="choices" role="group" aria-label="Answers">
          ${side.choices.map((_, i) => {
            const done = pathOf(run, where.side, i);
            const mark = task && done ? (task.reward(textOf(run, where.side, i)) ? "✓" : "✗") : "";
            return html`<button class="small" aria-pressed=${i === where.choice} onClick=${() => onChoose(i)}>
              ${i + 1} ${mark}
            </button>`;
          })}
        </div>`
      }
      ${!side.done && html`<span class="busy">sampling…</span>`}
    </div>
    ${side.error && side.error.message !== told && html`<p class="error" role="alert">${side.error.message}</p>`}
    <${Tokens}
      id=${name}
      label=${guided ? "Guided answer" : "Answer of the model by itself"}
      path=${path}
      steps=${steps}
      text=${text}
      colour=${colour}
      range=${range}
      selected=${path ? Math.min(selected, path.length - 1) : null}
      onSelect=${onSelect}
    />
    <${Figures} path=${path} steps=${steps} reward=${reward} guided=${guided} />
    ${task?.graph && path && html`<${StarGraph} graph=${task.graph} text=${text} />`}
  </section>`;
}

/** Value and KL along the answers that are shown. */
export function Lines({ shown, beside, range, selected, onSelect }) {
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
      <${TokenLines}
        series=${values}
        range=${range}
        selected=${selected}
        onSelect=${onSelect}
        yLabel="value, in units of reward"
      />
      <${TokenLines} series=${kls} range=${[0, most]} selected=${selected} onSelect=${onSelect} yLabel="KL, in nats" />
    </div>
  </section>`;
}
