/** A star graph, drawn from its prompt: its arms, the goal, and the path that an answer takes. */

import { html } from "./ui.js";

/** Nodes by their distance from the start, one list for each arm. */
function armsOf({ edges, start }) {
  const beside = new Map();
  for (const [a, b] of edges) {
    beside.set(a, [...(beside.get(a) ?? []), b]);
    beside.set(b, [...(beside.get(b) ?? []), a]);
  }
  return (beside.get(start) ?? []).map((first) => {
    const arm = [first];
    for (let before = start; ;) {
      const next = beside.get(arm.at(-1)).find((node) => node !== before && !arm.includes(node));
      if (next === undefined) return arm;
      before = arm.at(-1);
      arm.push(next);
    }
  });
}

export function StarGraph({ graph, text }) {
  const arms = armsOf(graph);
  const path = text.trim().split("\n", 1)[0].split(",");
  const longest = Math.max(...arms.map((arm) => arm.length));
  const [width, row] = [560, 46];
  const height = row * arms.length;
  const x = (depth) => 30 + (depth / longest) * (width - 60);
  const start = [x(0), height / 2];
  const at = (arm, depth) => [x(depth + 1), row * (arm + 0.5)];
  const walked = (a, b) =>
    path.some((node, i) => i && ((path[i - 1] === a && node === b) || (path[i - 1] === b && node === a)));
  const edge = ([x1, y1], [x2, y2], on) =>
    html`<line class=${on ? "walked" : ""} x1=${x1} y1=${y1} x2=${x2} y2=${y2} />`;
  const node = ([cx, cy], name) =>
    html`<g class=${`node${path.includes(name) ? " walked" : ""}${name === graph.goal ? " goal" : ""}`}>
      <circle cx=${cx} cy=${cy} r="15" />
      <text x=${cx} y=${cy + 4} text-anchor="middle">${name}</text>
    </g>`;
  const ends = path.at(-1) === graph.goal ? "It reaches the goal." : "It does not reach the goal.";
  return html`<figure class="graph">
    <svg
      viewBox=${`0 0 ${width} ${height}`}
      role="img"
      aria-label=${`${arms.length} arms from ${graph.start} to ${graph.goal}. The answer: ${path.join(", ")}. ${ends}`}
    >
      ${arms.map((arm, i) =>
        arm.map((name, depth) =>
          depth
            ? edge(at(i, depth - 1), at(i, depth), walked(arm[depth - 1], name))
            : edge(start, at(i, 0), walked(graph.start, name)),
        ),
      )}
      ${node(start, graph.start)} ${arms.map((arm, i) => arm.map((name, depth) => node(at(i, depth), name)))}
    </svg>
    <figcaption>From ${graph.start} to the goal ${graph.goal}. Filled: the way that the answer takes.</figcaption>
  </figure>`;
}
