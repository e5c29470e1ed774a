/** What stands around the answers: the head of the page, and what its terms mean. */

import { savedKey, saveKey } from "./api.js";
import { html, useState } from "./ui.js";

export function Header({ server, onKey, keyWanted }) {
  const [key, setKey] = useState(savedKey());
  const entered = (event) => {
    event.preventDefault();
    saveKey(key.trim());
    onKey();
  };
  return html`<header>
    <h1>Playground</h1>
    <span class="served">${server?.models.join(", ") ?? ""}</span>
    <form class="row" onSubmit=${entered}>
      <label for="key">Key</label>
      <input
        id="key"
        type="password"
        autocomplete="off"
        value=${key}
        aria-invalid=${keyWanted}
        placeholder=${keyWanted ? "wanted" : "none needed"}
        onInput=${(event) => setKey(event.target.value)}
      />
      <button class="small">Use</button>
    </form>
    <nav aria-label="Elsewhere"><a href="../docs">API</a></nav>
  </header>`;
}

/** What the words mean, in full until there is an answer to look at. */
export function Terms({ open }) {
  return html`<details class="card terms" open=${open}>
    <summary>
      <h2>What you see: critic, eta, KL and value</h2>
    </summary>
    <dl>
      <dt>Critic</dt>
      <dd>
        A small model that has learned which answers earn a reward. At each token it says how much reward to expect
        after each candidate.
      </dd>
      <dt>eta</dt>
      <dd>
        How strongly the critic may steer. A candidate that is better by one eta of reward becomes about e ≈ 2.7 times
        as likely.
      </dd>
      <dt>KL</dt>
      <dd>
        What that costs: how far the guided choice is from the model's own, in nats. 0 is the model itself. At a KL of 1
        guidance has made what it drew 2.7 times as likely, on average; of 2, 7.4 times.
      </dd>
      <dt>Value</dt>
      <dd>
        What the critic expects of the rest: the reward, less eta for each nat of KL still to be spent. It rises when a
        good token is drawn.
      </dd>
    </dl>
  </details>`;
}
