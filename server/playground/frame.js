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
        It has learned which answers earn a reward. For each likely next token, a candidate, it says how much reward the
        model would earn if it went on <b>by itself</b> from there. In the examples right earns 1, and wrong 0.
      </dd>
      <dt>eta</dt>
      <dd>
        How strongly the critic steers. Large: hardly. Small: each candidate's chance is multiplied by about its chance
        of earning the reward, and all are scaled to 100 %. A still smaller eta changes little more.
      </dd>
      <dt>KL</dt>
      <dd>
        How far guidance moves the model's choice at a token, over all that could be drawn there, in nats. 0: not at
        all. 1: a typical drawn token has become some 2.7 times as likely. An answer's KL is the sum over its tokens.
      </dd>
      <dt>Value</dt>
      <dd>
        What the critic expects from here on <b>with guidance</b>: the reward, less eta times the KL still to come. So
        it can be above what the model would earn by itself. After a good token the next one's value is higher.
      </dd>
    </dl>
  </details>`;
}
