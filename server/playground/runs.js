/** Runs: one request, or a branch of an earlier one, with its answers and those of the model itself beside them. */

import { ApiError, json, stream } from "./api.js";
import { reweigh } from "./weighting.js";

const LEAST_BUDGET = 1e-6; // nats that a request may name
const UNGUIDED_ETA = 1e6; // changes no probability by more than a millionth, and the critic is still asked

export const DEFAULTS = {
  mode: "text",
  prompt: "",
  model: "",
  critic: "",
  eta: 0.1,
  method: "qsharp",
  tail: "floor",
  candidates: 20,
  min_prob: 0.01,
  kl_total: null,
  max_tokens: 60,
  temperature: 1,
  n: 2,
  stop: "",
  seed: null,
  plain: true,
};

/** The fields of a request that say how it is guided and sampled. */
function sampling(settings, side) {
  const { eta, method, tail, candidates, min_prob, kl_total } = settings;
  const guidance = { method, tail, candidates, min_prob, detail: "candidates" };
  if (settings.critic) guidance.critic = settings.critic;
  if (kl_total !== null && side === "guided") guidance.kl_total = kl_total;
  const fields = {
    model: settings.model,
    temperature: settings.temperature,
    n: settings.n,
    eta: side === "guided" ? eta : UNGUIDED_ETA,
    guidance,
    return_token_ids: true,
  };
  if (!settings.critic) Object.assign(fields, { eta: null, guidance: { detail: "candidates" } });
  if (settings.stop) fields.stop = settings.stop.split("|").map((text) => text.replaceAll("\\n", "\n"));
  if (settings.seed !== null) fields.seed = settings.seed;
  return fields;
}

/** The path and the body of a request. */
export function requestOf(settings, side, promptIds = null, maxTokens = settings.max_tokens) {
  const fields = { ...sampling(settings, side), max_tokens: maxTokens };
  if (promptIds !== null) return ["v1/completions", { ...fields, prompt: promptIds }];
  if (settings.mode === "text") return ["v1/completions", { ...fields, prompt: settings.prompt }];
  return ["v1/chat/completions", { ...fields, messages: [{ role: "user", content: settings.prompt }] }];
}

const emptySide = (n) => ({
  choices: Array.from({ length: n }, () => ({ text: "", guidance: null, finish: null })),
  error: null,
  done: false,
});

/** What limits the KL of an answer, from the end of the prompt on; null if nothing does. */
export function budgetOf(run, guidance) {
  if (!guidance.kl_budget) return null;
  return run.from ? { ...guidance.kl_budget, total: run.settings.kl_total } : guidance.kl_budget;
}

/** What a branch has left of its budget: the tokens before it have spent of it. */
function left(run) {
  const { kl_total: total } = run.settings;
  if (total === null || !run.prefix.length) return total;
  const steps = reweigh(run.prefix, run.distribution, run.settings, { total, token: null });
  return Math.max(total - steps.reduce((spent, step) => spent + step.kl, 0), LEAST_BUDGET);
}

let last = 0;

/**
 * A run that has not begun.
 *
 * @param settings of the form.
 * @param from null, or `{ run, side, choice, at, tokenId, text }`: the branch takes this token in place of the one at
 *   `at` of that answer.
 */
export function newRun(settings, from = null) {
  last += 1;
  return {
    id: last,
    settings,
    from: from && { run: from.run.id, side: from.side, choice: from.choice, at: from.at, text: from.text },
    prefix: from ? prefixOf(from) : [],
    distribution: from ? from.run[from.side].choices[from.choice].guidance.distribution : null,
    promptIds: from ? from.run.promptIds : null,
    guided: emptySide(settings.n),
    plain: settings.plain && settings.critic ? emptySide(settings.n) : null,
  };
}

function prefixOf({ run, side, choice, at, tokenId, text }) {
  const path = pathOf(run, side, choice);
  const candidates = path[at].candidates;
  const place = candidates ? candidates.token_ids.indexOf(tokenId) : -1;
  const refLogprob = place < 0 ? path[at].ref_logprob : candidates.ref_logprobs[place];
  const forced = { ...path[at], token_id: tokenId, text, ref_logprob: refLogprob, forced: true };
  return [...path.slice(0, at), forced];
}

/** The tokens of an answer from the end of the prompt on, those before its branch too; null while it is sampled. */
export function pathOf(run, side, choice) {
  const tokens = run[side]?.choices[choice]?.guidance?.tokens;
  return tokens ? [...run.prefix, ...tokens] : null;
}

/** The text of an answer, what stood before its branch included. */
export function textOf(run, side, choice) {
  const before = run.prefix.map((token) => token.text).join("");
  return before + (run[side]?.choices[choice]?.text ?? "");
}

/** How `runs` change: `{ type, id, side, … }`. */
export function reduce(runs, action) {
  if (action.type === "add") return [...runs, action.run].slice(-30);
  return runs.map((run) => (run.id === action.id ? changed(run, action) : run));
}

function changed(run, action) {
  if (action.type === "prompt") return { ...run, promptIds: run.promptIds ?? action.ids };
  const side = run[action.side];
  if (action.type === "end") return { ...run, [action.side]: { ...side, done: true, error: action.error ?? null } };
  const choices = side.choices.map((choice, i) => {
    if (i !== action.index) return choice;
    return {
      text: choice.text + action.text,
      guidance: action.guidance ?? choice.guidance,
      finish: action.finish ?? choice.finish,
    };
  });
  return { ...run, [action.side]: { ...side, choices } };
}

/** Samples one side of a run; `dispatch` is told of all that arrives, and of the error that ends it, if one does. */
async function sample(run, side, dispatch, signal) {
  const ids = run.from ? [...run.promptIds, ...run.prefix.map((token) => token.token_id)] : null;
  const room = Math.max(run.settings.max_tokens - run.prefix.length, 1);
  const [path, body] = requestOf({ ...run.settings, kl_total: left(run) }, side, ids, room);
  try {
    for await (const chunk of stream(path, body, signal)) {
      const promptIds =
        chunk.prompt_token_ids ?? chunk.choices?.find((choice) => choice.prompt_token_ids)?.prompt_token_ids;
      if (promptIds) dispatch({ type: "prompt", id: run.id, ids: promptIds });
      for (const choice of chunk.choices ?? []) {
        const text = choice.text ?? choice.delta?.content ?? "";
        const { index, guidance, finish_reason: finish } = choice;
        dispatch({ type: "text", id: run.id, side, index, text, guidance, finish });
      }
    }
    dispatch({ type: "end", id: run.id, side });
  } catch (error) {
    const told = error.name === "AbortError" ? new ApiError("Stopped.") : error;
    dispatch({ type: "end", id: run.id, side, error: told });
  }
}

/** Samples both sides of a run, at the same time. */
export async function start(run, dispatch, signal) {
  dispatch({ type: "add", run });
  const sides = run.plain ? ["guided", "plain"] : ["guided"];
  await Promise.all(sides.map((side) => sample(run, side, dispatch, signal)));
}

/** The models and the critics that the server has. */
export async function describeServer() {
  const [models, critics] = await Promise.all([json("v1/models"), json("v1/critics")]);
  return {
    models: models.data.filter((model) => !model.parent).map((model) => model.id),
    critics: critics.data
      .filter((critic) => !critic.leaving)
      .map(({ id, name, active, default: first, card }) => ({ id, name, active, first: first && active, card })),
  };
}
