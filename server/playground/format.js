/** Numbers and tokens as people read them. */

/** A probability: 43 %, 0.2 %, or 3e-5 where it is small. */
export function percent(p) {
  if (p >= 0.0995) return `${Math.round(p * 100)} %`;
  if (p >= 0.0005) return `${(p * 100).toFixed(p >= 0.01 ? 1 : 2)} %`;
  return p === 0 ? "0" : p.toExponential(0);
}

/** A number with as many digits as help. */
export function short(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  if (size >= 100) return x.toFixed(0);
  if (size >= 10) return x.toFixed(1);
  return size < 1e-9 || size >= 0.01 ? x.toFixed(2) : x.toExponential(0);
}

const COMPACT = new Intl.NumberFormat("en", {
  notation: "compact",
  compactDisplay: "long",
  maximumSignificantDigits: 2,
});

/** A probability from its logarithm, however small: 1 in 4 thousand, or 1 in 10^18. */
export function chance(logProbability) {
  if (logProbability > Math.log(0.001)) return percent(Math.exp(logProbability));
  const power = -logProbability / Math.LN10;
  return power < 13 ? `1 in ${COMPACT.format(10 ** power)}` : `1 in 10^${power.toFixed(0)}`;
}

/** How a probability compares with another, from the logarithm of their ratio. */
export function compared(logRatio) {
  if (Math.abs(logRatio) < 0.005) return "the same";
  const ratio = Math.exp(Math.abs(logRatio));
  const times = ratio < 1e4 ? short(ratio) : COMPACT.format(ratio);
  return logRatio > 0 ? `${times} times as likely` : `${times} times less likely`;
}

/** A token's text in a line of its own: blanks at its ends and line breaks become visible. */
export function named(text) {
  if (text === "") return "(part of a character)";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
}

/** A token's text within the answer: a line break is marked, and still breaks the line. */
export const inText = (text) => text.replace(/\n/g, "↵\n");

export const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

/** The standard error of a mean; null of fewer than two values. */
export function standardError(values) {
  if (values.length < 2) return null;
  const middle = mean(values);
  const variance = values.reduce((a, b) => a + (b - middle) ** 2, 0) / (values.length - 1);
  return Math.sqrt(variance / values.length);
}
