/** All runs and their branches, as a tree; any answer can be shown, or put beside the one that is shown. */

import { named, short } from "./format.js";
import { pathOf, textOf } from "./runs.js";
import { html } from "./ui.js";

const same = (a, b) => a !== null && a.run === b.run && a.side === b.side && a.choice === b.choice;

function Answer({ run, side, choice, task, shown, beside, onShow, onBeside }) {
  const where = { run: run.id, side, choice };
  const guidance = run[side].choices[choice].guidance;
  const text = textOf(run, side, choice).slice(run.prefix.map((token) => token.text).join("").length);
  const reward = task && pathOf(run, side, choice) ? task.reward(textOf(run, side, choice)) : null;
  const name = side === "plain" ? "by itself" : "guided";
  return html`<li>
    <div class="branch">
      <button class="link" aria-current=${same(shown, where) ? "true" : undefined} onClick=${() => onShow(where)}>
        ${reward !== null && html`<b class=${reward ? "right" : "wrong"}>${reward ? "✓" : "✗"}</b> `}
        <small>${name}${guidance && side === "guided" && `, KL ${short(guidance.kl)}`}</small>
        ${" "}${text ? named(text.slice(0, 60)) : "…"}
      </button>
      <button class="small" aria-pressed=${same(beside, where)} onClick=${() => onBeside(where)}>Beside</button>
    </div>
  </li>`;
}

function Run({ run, runs, level, ...rest }) {
  const branches = runs.filter((one) => one.from?.run === run.id);
  const sides = run.plain ? ["guided", "plain"] : ["guided"];
  const title = run.from
    ? html`<b>Token ${run.from.at + 1} is <q>${named(run.from.text)}</q></b>`
    : html`<b>Request ${run.id}</b>, eta ${short(run.settings.eta)}`;
  return html`<li>
    <span>${title}</span>
    <ul>
      ${run.guided.error && html`<li><small>${run.guided.error.message}</small></li>`}
      ${sides.flatMap((side) =>
        run[side].choices.map(
          (choice, i) =>
            (choice.text || !run[side].error) && html`<${Answer} ...${rest} run=${run} side=${side} choice=${i} />`,
        ),
      )}
      ${branches.map((branch) => html`<${Run} ...${rest} run=${branch} runs=${runs} level=${level + 1} />`)}
    </ul>
  </li>`;
}

export function Tree({ runs, taskFor, ...rest }) {
  const roots = runs.filter((run) => !run.from || !runs.some((one) => one.id === run.from.run));
  return html`<section aria-labelledby="tree-title" class="card">
    <h2 id="tree-title">Answers and branches</h2>
    <p class="hint">
      Choose an answer to show it. “Beside” puts one next to it. Branches stand under what they go on from.
    </p>
    <ul class="tree">
      ${[...roots]
        .reverse()
        .map((run) => html`<${Run} ...${rest} task=${taskFor(run)} run=${run} runs=${runs} level=${0} />`)}
    </ul>
  </section>`;
}
