/** Drawings of numbers: lines over tokens or etas, and points with error bars. */

import { short } from "./format.js";
import { html, useWidth } from "./ui.js";

const LEFT = 44;
const RIGHT = 10;
const TOP = 10;

/** Round numbers from `low` to `high`, some four of them. */
export function ticks(low, high) {
  const span = high - low || 1;
  const step = 10 ** Math.floor(Math.log10(span / 2));
  const width = [1, 2, 2.5, 5, 10].map((k) => k * step).find((w) => span / w <= 4);
  const made = [];
  for (let at = Math.ceil(low / width - 1e-9) * width; at <= high + width * 1e-9; at += width) made.push(at);
  return made;
}

const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

const upright = (kind, x, y1, y2) => html`<line class=${kind} x1=${x} x2=${x} y1=${y1} y2=${y2} />`;
const level = (kind, y, x1, x2) => html`<line class=${kind} x1=${x1} x2=${x2} y1=${y} y2=${y} />`;

function Frame({ width, height, bottom, x, y, xTicks, yTicks, xLabel, yLabel, label, children, onClick }) {
  return html`<svg
    width=${width}
    height=${height}
    viewBox=${`0 0 ${width} ${height}`}
    role="img"
    aria-label=${label}
    onClick=${onClick}
  >
    ${yTicks.map(
      (at) =>
        html`<g class="grid">
          <line x1=${LEFT} x2=${width - RIGHT} y1=${y(at)} y2=${y(at)} />
          <text x=${LEFT - 6} y=${y(at) + 4} text-anchor="end">${short(at)}</text>
        </g>`,
    )}
    ${xTicks.map(
      ([at, text]) => html`<text class="tick" x=${x(at)} y=${height - bottom + 16} text-anchor="middle">${text}</text>`,
    )}
    <text class="axis" x=${LEFT} y=${TOP + 2} dy="-2">${yLabel}</text>
    <text class="axis" x=${width - RIGHT} y=${height - 3} text-anchor="end">${xLabel}</text>
    ${children}
  </svg>`;
}

/**
 * Lines over the tokens of an answer.
 *
 * @param series `{ values, name, kind }`: values may be null; `kind` is the name of a style.
 * @param range least and greatest value of the axis.
 * @param selected the token that is marked.
 * @param onSelect is called with the token that was clicked.
 */
export function TokenLines({ series, range, selected, onSelect, yLabel, height = 130 }) {
  const [ref, width] = useWidth();
  const count = Math.max(...series.map(({ values }) => values.length), 2);
  const bottom = 30;
  const x = (i) => LEFT + (i / (count - 1)) * (width - LEFT - RIGHT);
  const [low, high] = range;
  const y = (v) => TOP + 8 + (1 - (v - low) / (high - low || 1)) * (height - TOP - 8 - bottom);
  const clicked = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const at = Math.round(((event.clientX - box.left - LEFT) / (width - LEFT - RIGHT)) * (count - 1));
    onSelect(Math.min(Math.max(at, 0), count - 1));
  };
  const every = ticks(0, count - 1).filter(Number.isInteger);
  const told = series.map(({ name, values }) => {
    const known = values.filter((value) => value !== null);
    return known.length ? `${name}: from ${short(known[0])} to ${short(known.at(-1))}` : `${name}: none`;
  });
  return html`<div ref=${ref} class="chart">
    <${Frame}
      ...${{ width, height, bottom, x, y, yLabel }}
      xLabel="token"
      label=${told.join("; ")}
      onClick=${clicked}
      yTicks=${ticks(low, high)}
      xTicks=${every.map((at) => [at, at + 1])}
    >
      ${selected !== null && upright("marker", x(selected), TOP, height - bottom)}
      ${series.map(({ values, kind }) => {
        const points = values.flatMap((value, i) => (value === null ? [] : [[x(i), y(value)]]));
        return html`<g class=${kind}>
          <path class="line" d=${line(points)} />
          ${points.length < 80 && points.map(([cx, cy]) => html`<circle cx=${cx} cy=${cy} r="2.5" />`)}
        </g>`;
      })}
    <//>
  </div>`;
}

/**
 * A line over etas, on a logarithmic axis.
 *
 * @param points `[eta, value]`.
 * @param base a value that is drawn as a level line.
 */
export function EtaLine({ points, base, marked, yLabel, label, height = 150 }) {
  const [ref, width] = useWidth();
  const bottom = 30;
  const logs = points.map(([eta]) => Math.log10(eta));
  const [first, end] = [Math.min(...logs), Math.max(...logs)];
  const x = (eta) => LEFT + ((Math.log10(eta) - first) / (end - first)) * (width - LEFT - RIGHT);
  const values = [...points.map(([, value]) => value), base];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1) [low, high] = [(low + high) / 2 - 0.5, (low + high) / 2 + 0.5];
  const y = (v) => TOP + 8 + (1 - (v - low) / (high - low)) * (height - TOP - 8 - bottom);
  const at = Math.min(Math.max(marked, 10 ** first), 10 ** end);
  const tens = [0.01, 0.1, 1, 10].filter((eta) => eta >= 10 ** first * 0.99 && eta <= 10 ** end * 1.01);
  return html`<div ref=${ref} class="chart">
    <${Frame}
      ...${{ width, height, bottom, x, y, yLabel, label }}
      xLabel="eta"
      yTicks=${ticks(low, high)}
      xTicks=${tens.map((eta) => [eta, String(eta)])}
    >
      <line class="base" x1=${LEFT} x2=${width - RIGHT} y1=${y(base)} y2=${y(base)} />
      <line class="marker" x1=${x(at)} x2=${x(at)} y1=${TOP} y2=${height - bottom} />
      <g class="guided"><path class="line" d=${line(points.map(([eta, value]) => [x(eta), y(value)]))} /></g>
    <//>
  </div>`;
}

/**
 * Points with error bars, joined in their order.
 *
 * @param points `{ x, y, dx, dy, name }`; errors may be null.
 * @param range of the y axis.
 */
export function Points({ points, range, xLabel, yLabel, label, height = 260 }) {
  const [ref, width] = useWidth();
  const bottom = 34;
  const most = Math.max(...points.map((point) => point.x + (point.dx ?? 0)), 0.1);
  const x = (v) => LEFT + (v / most) * (width - LEFT - RIGHT - 30);
  const [low, high] = range;
  const y = (v) => TOP + 8 + (1 - (v - low) / (high - low || 1)) * (height - TOP - 8 - bottom);
  const joined = [...points].sort((a, b) => a.x - b.x).map((point) => [x(point.x), y(point.y)]);
  return html`<div ref=${ref} class="chart">
    <${Frame}
      ...${{ width, height, bottom, x, y, xLabel, yLabel, label }}
      yTicks=${ticks(low, high)}
      xTicks=${ticks(0, most).map((at) => [at, short(at)])}
    >
      <g class="guided"><path class="line faint" d=${line(joined)} /></g>
      ${points.map((point) => {
        const [cx, cy] = [x(point.x), y(point.y)];
        return html`<g class="guided">
          ${point.dy && upright("error", cx, y(point.y - point.dy), y(point.y + point.dy))}
          ${point.dx && level("error", cy, x(point.x - point.dx), x(point.x + point.dx))}
          <circle cx=${cx} cy=${cy} r="4.5" />
          <text x=${cx > width - 90 ? cx - 8 : cx + 8} y=${cy - 7} text-anchor=${cx > width - 90 ? "end" : "start"}
            >${point.name}</text
          >
        </g>`;
      })}
    <//>
  </div>`;
}
