/** An answer, token by token: coloured by KL or by value, and chosen by mouse or arrow keys. */

import { chance, inText, named, short } from "./format.js";
import { figure, html, useLayoutEffect, useMemo, useRef } from "./ui.js";

const MOST_KL = 2; // nats: what is more has the same colour

const STRONGEST = 0.55; // how far a colour covers what is behind the text

/** The colour behind a token; none where the critic was not asked. */
export function shade(step, colour, range) {
  if (!step.guided) return "";
  if (colour === "kl") return tint("guided", Math.sqrt(Math.min(step.kl, MOST_KL) / MOST_KL));
  const place = Math.min(Math.max((step.value - range[0]) / (range[1] - range[0]), 0), 1);
  return place < 0.5 ? tint("low", 1 - 2 * place) : tint("high", 2 * place - 1);
}

const tint = (name, strength) => `rgb(var(--${name}) / ${(strength * STRONGEST).toFixed(2)})`;

/** What the colours mean, with units. */
export function Legend({ colour, range }) {
  const marks =
    colour === "kl"
      ? [0, 0.1, 0.5, 1, MOST_KL].map((kl) => [Math.sqrt(kl / MOST_KL), kl === MOST_KL ? `${kl}+` : String(kl)])
      : [0, 0.5, 1].map((t) => [t, short(range[0] + t * (range[1] - range[0]))]);
  return html`<div class="legend">
    <span>${colour === "kl" ? "KL of the choice at each token, in nats" : "Value before a token, in units of reward"}</span>
    <div class="scale" aria-hidden="true">
      <div class=${`ramp ${colour}`}></div>
      ${marks.map(([t, text]) => html`<span class="mark" style=${{ left: `${t * 100}%` }}>${text}</span>`)}
    </div>
    <span
      >${
        colour === "kl"
          ? "Strong colour: guidance changes this choice much. None: not at all, or the critic was not asked."
          : "Orange: low. Blue: high; with a small eta even a slim chance counts, since guidance can take it. None: the middle, or the critic was not asked."
      }</span
    >
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
  const marked = useRef({ shades: [], option: null });
  // Colours change with every move of a slider: they are put on tokens directly, and only where they differ.
  const options = useMemo(() => {
    marked.current = { shades: [], option: null };
    return path?.map(
      (token, i) =>
        html`<span
          id=${`${id}-${i}`}
          data-i=${i}
          role="option"
          class=${token.forced ? "forced" : undefined}
          aria-label=${token.text.trim() ? undefined : named(token.text)}
        >
          ${inText(token.text) || "·"}
        </span>`,
    );
  }, [path]);
  useLayoutEffect(() => {
    const { shades } = marked.current;
    steps?.forEach((step, i) => {
      const now = shade(step, colour, range);
      if (shades[i] !== now) ref.current.children[i].style.backgroundColor = shades[i] = now;
    });
  }, [steps, colour, range[0], range[1]]);
  useLayoutEffect(() => {
    if (!path) return;
    marked.current.option?.removeAttribute("aria-selected");
    const option = (marked.current.option = ref.current.children[selected]);
    option.setAttribute("aria-selected", "true");
    if (document.activeElement === ref.current) option.scrollIntoView({ block: "nearest" });
  }, [path, selected]);
  if (!path) return html`<p class="text">${text || "…"}</p>`;
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
    class="text"
    role="listbox"
    tabindex="0"
    aria-label=${`${label}, token by token`}
    aria-activedescendant=${`${id}-${selected}`}
    onKeyDown=${moved}
    onClick=${clicked}
  >
    ${options}
  </div>`;
}

/** What an answer comes to, in a line. */
export function Figures({ path, steps, reward, guided }) {
  if (!path) return null;
  const total = (values) => values.reduce((a, b) => a + b, 0);
  const kl = total(steps.map((step) => step.kl));
  const first = steps.find((step) => step.value !== null);
  const figures = [
    reward === null ? null : html`<b class=${reward ? "right" : "wrong"}>${reward ? "✓ right" : "✗ wrong"}</b>`,
    html`${guided ? "KL" : "KL if guided"} ${figure(kl, short(kl))} nats`,
    first && html`value at the start${guided ? "" : ", if guided"} ${figure(first.value, short(first.value))}`,
    html`chance of just this text: <b>${chance(total(path.map((token) => token.ref_logprob)))}</b> by itself,
      <b> ${chance(total(steps.map((step) => step.logprob)))}</b> guided`,
  ];
  return html`<ul class="figures">
    ${figures.filter(Boolean).map((figure) => html`<li>${figure}</li>`)}
  </ul>`;
}
