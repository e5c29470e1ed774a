/** An answer, token by token: coloured by KL or by value, and chosen by mouse or arrow keys. */

import { chance, inText, short } from "./format.js";
import { html, useEffect, useRef } from "./ui.js";

const MOST_KL = 2; // nats: what is more has the same colour

/** From 0 to 1: how strong a step's colour is; null where it has none. */
export function heat(step, colour, range) {
  if (!step.guided) return null;
  if (colour === "kl") return Math.sqrt(Math.min(step.kl, MOST_KL) / MOST_KL);
  return Math.min(Math.max((step.value - range[0]) / (range[1] - range[0]), 0), 1);
}

/** What the colours mean, with units. */
export function Legend({ colour, range }) {
  const marks =
    colour === "kl"
      ? [0, 0.1, 0.5, 1, MOST_KL].map((kl) => [Math.sqrt(kl / MOST_KL), kl === MOST_KL ? `${kl}+` : String(kl)])
      : [0, 0.5, 1].map((t) => [t, short(range[0] + t * (range[1] - range[0]))]);
  return html`<div class="legend">
    <span>${colour === "kl" ? "KL of a token, in nats" : "Value before a token, in units of reward"}</span>
    <div class="scale" aria-hidden="true">
      <div class=${`ramp ${colour}`}></div>
      ${marks.map(([t, text]) => html`<span class="mark" style=${{ left: `${t * 100}%` }}>${text}</span>`)}
    </div>
    <span>${
      colour === "kl"
        ? "Strong: guidance has changed this choice much."
        : "Orange: the critic expects little from here on. Blue: much."
    }</span>
  </div>`;
}

/**
 * The text of an answer. Its tokens are a list of options, of which arrow keys move the chosen one.
 *
 * @param path the tokens; null while they are sampled, when `text` is shown.
 * @param steps of `reweigh`, one for each token.
 */
export function Tokens({ id, label, path, steps, text, colour, range, selected, onSelect }) {
  const ref = useRef(null);
  useEffect(() => {
    if (ref.current?.contains(document.activeElement)) {
      ref.current.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
    }
  }, [selected]);
  if (!path) return html`<p class="text" aria-live="off">${text || "…"}</p>`;
  const moved = (event) => {
    const at = { ArrowRight: selected + 1, ArrowLeft: selected - 1, Home: 0, End: path.length - 1 }[event.key];
    if (at === undefined) return;
    event.preventDefault();
    onSelect(Math.min(Math.max(at, 0), path.length - 1));
  };
  const clicked = (event) => {
    const token = event.target.closest("[data-i]");
    if (token) onSelect(Number(token.dataset.i));
  };
  return html`<div
    ref=${ref}
    class=${`text ${colour}`}
    role="listbox"
    tabindex="0"
    aria-label=${`${label}, token by token`}
    aria-activedescendant=${selected === null ? undefined : `${id}-${selected}`}
    onKeyDown=${moved}
    onClick=${clicked}
  >
    ${path.map((token, i) => {
      const t = heat(steps[i], colour, range);
      return html`<span
        id=${`${id}-${i}`}
        data-i=${i}
        role="option"
        aria-selected=${i === selected}
        class=${`${t === null ? "plain" : "warm"}${token.forced ? " forced" : ""}${token.text === "" ? " part" : ""}`}
        style=${t === null ? undefined : { "--t": t.toFixed(3) }}
        >${inText(token.text) || "·"}</span
      >`;
    })}
  </div>`;
}

/** What an answer comes to, in a line. */
export function Figures({ path, steps, reward, guided }) {
  if (!path) return null;
  const total = (values) => values.reduce((a, b) => a + b, 0);
  const first = steps.find((step) => step.value !== null);
  const figures = [
    reward === null ? null : html`<b class=${reward ? "right" : "wrong"}>${reward ? "✓ right" : "✗ wrong"}</b>`,
    html`${guided ? "KL" : "KL if guided"} <b>${short(total(steps.map((step) => step.kl)))}</b> nats`,
    first && html`value at first <b>${short(first.value)}</b>`,
    html`drawn by the model alone <b>${chance(total(path.map((token) => token.ref_logprob)))}</b>, guided
      <b> ${chance(total(steps.map((step) => step.logprob)))}</b>`,
  ];
  return html`<ul class="figures">
    ${figures.filter(Boolean).map((figure) => html`<li>${figure}</li>`)}
  </ul>`;
}
