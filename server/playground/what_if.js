/** What another eta, method or tail would have made of the answers that are shown. */

import { EtaLine } from "./charts.js";
import { Choice, Eta, METHODS, TAILS } from "./form.js";
import { chance, compared, short } from "./format.js";
import { budgetOf } from "./runs.js";
import { html, useEffect, useState } from "./ui.js";
import { reweigh } from "./weighting.js";

const ETAS = Array.from({ length: 31 }, (_, i) => 10 ** (-2 + i / 10));

export function WhatIf({ settings, sent, onChange }) {
  const changed = ["eta", "method", "tail"].some((name) => settings[name] !== sent[name]);
  const told = changed
    ? `Sampled with eta ${short(sent.eta)}; shown as eta ${short(settings.eta)} would weigh it.`
    : "Shown as it was sampled.";
  return html`<section class="card" aria-labelledby="what-if-title">
    <h2 id="what-if-title">What if?</h2>
    <p class="hint" id="about-what-if">
      Move eta to see what it would change, without asking the server: the critic's opinion does not depend on eta. The
      texts stay as they were drawn; their chances, KL, value and colours follow. For new texts set eta under Guide.
    </p>
    <div class="grid wide">
      <${Eta} id="what-if-eta" eta=${settings.eta} describedBy="about-what-if" onChange=${(eta) => onChange({ eta })} />
      <${Choice}
        label="Method"
        value=${settings.method}
        options=${METHODS}
        onChange=${(method) => onChange({ method })}
      />
      <${Choice}
        label="All other tokens"
        value=${settings.tail}
        options=${TAILS}
        onChange=${(tail) => onChange({ tail })}
      />
    </div>
    <div class="row">
      <button class="small" disabled=${!changed} onClick=${() => onChange(sent)}>Back to what was sent</button>
      <small class="hint">${told}</small>
    </div>
  </section>`;
}

/** How probable the shown answer, or its beginning, would have been. */
export function PathChance({ answer, settings, upTo, onUpTo }) {
  const { run, path, steps, guidance } = answer;
  const [curves, setCurves] = useState(null);
  useEffect(() => {
    setCurves(null);
    const later = setTimeout(() => {
      setCurves(
        ETAS.map((eta) => {
          let total = 0;
          return reweigh(path, guidance.distribution, { ...settings, eta }, budgetOf(run, guidance)).map(
            (step) => (total += step.logprob),
          );
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
      <span
        >${whole ? `The whole answer, ${path.length} tokens` : `Its first ${upTo + 1} of ${path.length} tokens`}</span
      >
      <input
        type="range"
        min="1"
        max=${path.length}
        step="1"
        value=${upTo + 1}
        aria-label="How many of its tokens"
        onInput=${(event) => onUpTo(Number(event.target.value) - 1)}
      />
    </label>
    <p>
      The model by itself: <b>${chance(reference)}</b>. Guided at eta ${short(settings.eta)}: <b>${chance(guided)}</b>,
      ${" "}${compared(guided - reference)}.
    </p>
    ${
      curves &&
      html`<${EtaLine}
        points=${ETAS.map((eta, i) => [eta, curves[i][upTo] / Math.LN10])}
        base=${reference / Math.LN10}
        marked=${settings.eta}
        yLabel="log10 of the probability: -1 is 10 % (grey: the model by itself)"
        label="Probability of this answer over eta"
      />`
    }
  </section>`;
}
