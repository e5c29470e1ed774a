/** Examples to begin with, and tasks whose reward is known from the prompt: a sum, and a path through a graph. */

// prettier-ignore
const SHOTS = [[1, 5, 3], [7, 8, 6], [4, 2, 9], [9, 9, 3], [2, 6, 1], [5, 7, 8], [8, 3, 4], [6, 4, 7]];

const question = ([a, b, c]) => `Question: What is ${a} + ${b} + ${c}?\nAnswer:`;
const solved = ([a, b, c]) => `${a} + ${b} = ${a + b}. ${a + b} + ${c} = ${a + b + c}. The answer is ${a + b + c}.`;
const shots = SHOTS.map((triple) => `${question(triple)} ${solved(triple)}\n\n`).join("");

export const EXAMPLES = [
  {
    id: "sums",
    label: "A sum of three digits",
    about: "The model by itself gets four in ten of these right. Its critic has learned how sums go on well.",
    fits: /smollm2-135m/i,
    fields: { mode: "text", prompt: shots + question([3, 9, 1]), max_tokens: 48, stop: "\\n", candidates: 8, n: 4 },
  },
  {
    id: "star-graph",
    label: "A path through a graph",
    about: "The model takes an arm at random. Its critic knows which arm leads to the goal.",
    fits: /star-graph/i,
    fields: {
      mode: "text",
      prompt:
        "21,13|20,15|17,9|17,5|16,19|1,18|3,0|17,16|5,12|7,3|9,7|11,1|18,4|19,23|17,14|23,8|12,20|13,10|14,21|17,11" +
        "/17,4=",
      max_tokens: 16,
      stop: "",
      candidates: 8,
      n: 4,
    },
  },
  {
    id: "own",
    label: "A text of your own",
    about: "Whatever you write here, the model goes on with it.",
    fits: /./,
    fields: { mode: "text", prompt: "The best way to learn something new is", max_tokens: 60, stop: "", n: 2 },
  },
  {
    id: "chat",
    label: "A chat message of your own",
    about: "Sent through the model's chat template.",
    fits: /(?!)/,
    fields: { mode: "chat", prompt: "Tell me something about the sea.", max_tokens: 80, stop: "", n: 2 },
  },
];

/** A graph from a prompt that ends with `a,b|c,d|…/start,goal=`; null from any other. */
export function graphOf(prompt) {
  const found = /(?:^|\s)(\d+,\d+(?:\|\d+,\d+)*)\/(\d+),(\d+)=\s*$/.exec(prompt);
  if (!found) return null;
  return { edges: found[1].split("|").map((edge) => edge.split(",")), start: found[2], goal: found[3] };
}

/** What an answer to this prompt earns: `{ name, reward(text), graph }`; null where that is not known here. */
export function taskOf(prompt) {
  const graph = graphOf(prompt);
  if (graph) return { name: "the path leads to the goal", graph, reward: (text) => Number(solves(graph, text)) };
  const asked = [...prompt.matchAll(/What is (\d+) \+ (\d+) \+ (\d+)\?\s*Answer:/g)].pop();
  if (asked && prompt.endsWith(asked[0])) {
    const total = asked.slice(1).reduce((sum, digit) => sum + Number(digit), 0);
    const reward = (text) => {
      const answer = /The answer is (-?\d+(?:[.,]\d+)*)/.exec(text.split("\n", 1)[0]);
      return Number(answer?.[1] === String(total));
    };
    return { name: `the answer is ${total}`, graph: null, reward };
  }
  return null;
}

function solves({ edges, start, goal }, text) {
  const path = text.trim().split("\n", 1)[0].split(",");
  const known = new Set(edges.flatMap(([a, b]) => [`${a},${b}`, `${b},${a}`]));
  const steps = path.slice(1).map((node, i) => `${path[i]},${node}`);
  return (
    path[0] === start &&
    path.at(-1) === goal &&
    new Set(path).size === path.length &&
    steps.every((step) => known.has(step))
  );
}
