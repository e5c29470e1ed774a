/** The request: what is asked, how strongly it is guided, how it is sampled. */

import { EXAMPLES } from "./tasks.js";
import { html, useEffect, useRef } from "./ui.js";

const SLIDER = [-2, 1]; // powers of ten; the number beside it takes any eta

/** A slider for eta on a logarithmic scale, and a number for any other eta. */
export function Eta({ id, eta, onChange, invalid, describedBy }) {
  const place = Math.min(Math.max(Math.log10(eta), SLIDER[0]), SLIDER[1]);
  const slid = (event) => onChange(Number((10 ** Number(event.target.value)).toPrecision(3)));
  const typed = (event) => {
    const value = Number(event.target.value);
    if (value > 0) onChange(value);
  };
  return html`<div class="eta">
    <label for=${id}>eta</label>
    <input
      id=${id}
      type="range"
      min=${SLIDER[0]}
      max=${SLIDER[1]}
      step="0.01"
      value=${place}
      aria-valuetext=${String(eta)}
      aria-describedby=${describedBy}
      onInput=${slid}
    />
    <input
      type="number"
      name="eta"
      min="0.000001"
      max="1000000"
      step="any"
      value=${eta}
      aria-label="eta as a number"
      aria-invalid=${invalid}
      onInput=${typed}
    />
    <span class="ends" aria-hidden="true"><span>0.01 strong</span><span>10 weak</span></span>
  </div>`;
}

export function Choice({ name, label, value, options, onChange, invalid }) {
  const picked = (event) => onChange(event.target.value);
  return html`<label class="field">
    <span>${label}</span>
    <select name=${name} value=${value} aria-invalid=${invalid} onChange=${picked}>
      ${options.map(([key, text]) => html`<option value=${key} selected=${key === value}>${text}</option>`)}
    </select>
  </label>`;
}

export const METHODS = [["qsharp", "Q♯"], ["cd", "Controlled Decoding"]]; // prettier-ignore
export const TAILS = [
  ["floor", "floor: as if they earned least"],
  ["keep", "keep: their share stays"],
  ["drop", "drop: excluded"],
];

function Numeric({ name, label, value, onChange, invalid, optional = false, ...limits }) {
  const typed = (event) => {
    const text = event.target.value;
    if (text === "" && optional) onChange(null);
    else if (text !== "" && Number.isFinite(Number(text))) onChange(Number(text));
  };
  return html`<label class="field">
    <span>${label}</span>
    <input type="number" name=${name} value=${value ?? ""} aria-invalid=${invalid} onInput=${typed} ...${limits} />
  </label>`;
}

/**
 * @param settings the fields' values; `onChange` is given those that change.
 * @param server the models and critics that there are; null until they are known.
 * @param wrong the field that the server refused, by its name there.
 */
export function Form({ settings, server, busy, wrong, onChange, onSend, onStop }) {
  const set = (name) => (value) => onChange({ [name]: value });
  const invalid = (name) => wrong === name || wrong === `guidance.${name}`;
  const submitted = (event) => {
    event.preventDefault();
    onSend();
  };
  const hurried = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submitted(event);
  };
  const example = EXAMPLES.find(({ fields }) => fields.prompt === settings.prompt);
  const chosen = (id) => {
    const found = EXAMPLES.find((one) => one.id === id);
    if (found) onChange(found.fields);
  };
  const prompt = useRef(null);
  useEffect(() => {
    prompt.current.scrollTop = prompt.current.scrollHeight; // what is asked stands at the end
  }, [example?.id]);
  const critics = (server?.critics ?? []).map(({ id, active }) => [id, active ? `${id} (active)` : id]);
  return html`<form onSubmit=${submitted} onKeyDown=${hurried}>
    <h2>Ask</h2>
    <${Choice}
      name="example"
      label="Example"
      value=${example?.id ?? ""}
      onChange=${chosen}
      options=${[...(example ? [] : [["", "–"]]), ...EXAMPLES.map(({ id, label }) => [id, label])]}
    />
    ${example && html`<p class="hint">${example.about}</p>`}
    <fieldset class="row">
      <legend class="unseen">Kind of prompt</legend>
      ${[
        ["text", "Text to go on with"],
        ["chat", "Chat message"],
      ].map(
        ([mode, label]) =>
          html`<label class="check">
            <input type="radio" name="mode" checked=${settings.mode === mode} onChange=${() => set("mode")(mode)} />
            ${label}
          </label>`,
      )}
    </fieldset>
    <label class="field">
      <span>Prompt</span>
      <textarea
        ref=${prompt}
        name=${settings.mode === "chat" ? "messages" : "prompt"}
        rows="8"
        value=${settings.prompt}
        aria-invalid=${invalid("prompt") || invalid("messages")}
        onInput=${(event) => onChange({ prompt: event.target.value })}
      ></textarea>
    </label>

    <h2>Guide</h2>
    <${Eta}
      id="form-eta"
      eta=${settings.eta}
      onChange=${set("eta")}
      invalid=${invalid("eta")}
      describedBy="about-eta"
    />
    <p class="hint" id="about-eta">
      How strongly the critic steers. <b>Small</b>: strongly, but among equally good tokens the model still
      chooses. <b>Large</b>: hardly, the model stays as it is.
    </p>
    <${Choice}
      name="guidance.critic"
      label="Critic"
      value=${settings.critic}
      onChange=${set("critic")}
      options=${critics.length ? critics : [["", "none is loaded"]]}
      invalid=${invalid("critic")}
    />
    <details open=${wrong?.startsWith("guidance.") || undefined}>
      <summary>More about guidance</summary>
      <div class="grid">
        <${Choice}
          name="guidance.method"
          label="Method"
          value=${settings.method}
          options=${METHODS}
          onChange=${set("method")}
        />
        <${Choice}
          name="guidance.tail"
          label="All other tokens"
          value=${settings.tail}
          options=${TAILS}
          onChange=${set("tail")}
        />
        <${Numeric}
          name="guidance.candidates"
          label="Candidates"
          value=${settings.candidates}
          min="1"
          max="256"
          step="1"
          invalid=${invalid("candidates")}
          onChange=${set("candidates")}
        />
        <${Numeric}
          name="guidance.min_prob"
          label="Min. probability"
          value=${settings.min_prob}
          min="0"
          max="1"
          step="any"
          invalid=${invalid("min_prob")}
          onChange=${set("min_prob")}
        />
        <${Numeric}
          name="guidance.kl_total"
          label="KL budget, nats (none)"
          value=${settings.kl_total}
          min="0.000001"
          step="any"
          optional
          invalid=${invalid("kl_total")}
          onChange=${set("kl_total")}
        />
      </div>
      <p class="hint">
        The critic weighs the likeliest tokens of each step, the candidates. All other tokens are the tail.
      </p>
    </details>

    <h2>Sample</h2>
    <div class="grid">
      <${Numeric}
        name="max_tokens"
        label="Most tokens"
        value=${settings.max_tokens}
        min="1"
        step="1"
        invalid=${invalid("max_tokens")}
        onChange=${set("max_tokens")}
      />
      <${Numeric}
        name="n"
        label="Answers"
        value=${settings.n}
        min="1"
        max="16"
        step="1"
        invalid=${invalid("n")}
        onChange=${set("n")}
      />
      <${Numeric}
        name="temperature"
        label="Temperature"
        value=${settings.temperature}
        min="0"
        max="2"
        step="any"
        invalid=${invalid("temperature")}
        onChange=${set("temperature")}
      />
      <${Numeric}
        name="seed"
        label="Seed (none)"
        value=${settings.seed}
        step="1"
        optional
        invalid=${invalid("seed")}
        onChange=${set("seed")}
      />
      <label class="field">
        <span>Stop at</span>
        <input
          name="stop"
          value=${settings.stop}
          placeholder="\\n or a|b"
          aria-invalid=${invalid("stop")}
          onInput=${(event) => onChange({ stop: event.target.value })}
        />
      </label>
      ${
        (server?.models.length ?? 0) > 1 &&
        html`<${Choice}
          name="model"
          label="Model"
          value=${settings.model}
          options=${server.models.map((id) => [id, id])}
          onChange=${set("model")}
        />`
      }
    </div>
    <label class="check">
      <input
        type="checkbox"
        checked=${settings.plain}
        onChange=${(event) => onChange({ plain: event.target.checked })}
      />
      The model by itself beside it
    </label>
    <div class="row send">
      <button class="primary" type="submit" disabled=${busy || !settings.model}>Send</button>
      <button type="button" disabled=${!busy} onClick=${onStop}>Stop</button>
      <small class="hint">Ctrl + Enter sends</small>
    </div>
  </form>`;
}
