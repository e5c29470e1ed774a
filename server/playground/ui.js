/** Preact, htm and the hooks that all parts of the page use. */

import { h, render } from "./vendor/preact.js";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

export { render, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState };
export const html = htm.bind(h);

/** A number in few digits; whoever points at it sees all of them. */
export const figure = (x, text) => html`<data class="figure" value=${x} title=${x}>${text}</data>`;

/** The width of an element in pixels, and the reference to put on it. */
export function useWidth(initial = 600) {
  const ref = useRef(null);
  const [width, setWidth] = useState(initial);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.max(entry.contentRect.width, 120)));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}
