/** What could have stood in a token's place: the candidates of a step, with and without guidance. */

import { named, percent, short } from "./format.js";
import { figure, html } from "./ui.js";
import { expectedReward } from "./weighting.js";

function Bars({ reference, guided }) {
  return html`<div class="bars" aria-hidden="true">
    <div class="bar reference" style=${{ width: `${reference * 100}%` }}></div>
    <div class="bar guided" style=${{ width: `${guided * 100}%` }}></div>
  </div>`;
}

/**
 * @param token an entry of the answer.
 * @param step what `reweigh` says of it.
 * @param place its number in the answer, from 0.
 * @param onBranch is called with a token's id and text, to go on from there.
 */
export function Candidates({ token, step, place, distribution, onBranch }) {
  const heading = html`<h3>Token ${place + 1}: <q>${named(token.text)}</q>${token.forced && " (chosen by you)"}</h3>`;
  if (!token.candidates || !step.guided) {
    return html`<div>
      ${heading}
      <p>
        Drawn with a probability of ${percent(Math.exp(token.ref_logprob))}.
        ${
          distribution
            ? " The critic was not asked: no second token was as likely as “Min. probability”."
            : " This answer was not guided."
        }
      </p>
    </div>`;
  }
  const { token_ids: ids, texts, ref_logprobs: logRefs, outputs, tail_mass: tailMass } = token.candidates;
  const { guided } = step;
  const drawn = ids.indexOf(token.token_id);
  const tail = tailMass * Math.exp(guided.tailLogRatio);
  return html`<div>
    ${heading}
    <ul class="figures">
      <li>KL ${figure(step.kl, short(step.kl))} nats</li>
      <li>value ${figure(step.value, short(step.value))}</li>
      ${step.strength < 1 && html`<li>held back by the budget to <b>${percent(step.strength)}</b> of its strength</li>`}
    </ul>
    ${
      drawn < 0 &&
      html`<p>
        This token is none of the candidates. It came from the tail, all other tokens together, of which the critic is
        not asked. It had ${percent(Math.exp(token.ref_logprob))} with the model alone and
        ${percent(Math.exp(step.logprob))} ${" "}guided.
      </p>`
    }
    <div class="scrolled" tabindex="0" role="region" aria-label="Candidates">
      <table>
        <thead>
          <tr>
            <th scope="col">Token</th>
            <th scope="col">
              <span class="key reference"></span><span class="roomy"> the model,</span> <span class="key guided"></span
              ><span class="roomy"> guided</span>
            </th>
            <th scope="col" class="number">model</th>
            <th scope="col" class="number">guided</th>
            <th scope="col" class="number">reward<span class="roomy"> by itself</span></th>
            <th scope="col"><span class="unseen">Branch</span></th>
          </tr>
        </thead>
        <tbody>
          ${ids.map((id, i) => {
            const reference = Math.exp(logRefs[i]);
            const now = Math.exp(logRefs[i] + guided.logRatios[i]);
            return html`<tr class=${i === drawn ? "drawn" : ""}>
              <th scope="row">
                <code>${named(texts[i])}</code>${i === drawn && html` <small class="roomy">in the answer</small>`}
              </th>
              <td><${Bars} reference=${reference} guided=${now} /></td>
              <td class="number">${figure(reference, percent(reference))}</td>
              <td class="number">${figure(now, percent(now))}</td>
              <td class="number">${short(expectedReward(distribution, outputs[i]))}</td>
              <td>
                <button
                  class="small"
                  aria-label=${`Go on from ${named(texts[i])}`}
                  onClick=${() => onBranch(id, texts[i])}
                >
                  Go on<span class="roomy"> from here</span>
                </button>
              </td>
            </tr>`;
          })}
          <tr class="tail">
            <th scope="row">all other tokens</th>
            <td><${Bars} reference=${tailMass} guided=${tail} /></td>
            <td class="number">${percent(tailMass)}</td>
            <td class="number">${percent(tail)}</td>
            <td class="number">not asked</td>
            <td></td>
          </tr>
        </tbody>
      </table>
    </div>
  </div>`;
}
