/** Calls of the server that this page comes from. What goes wrong is an `ApiError`, whose message is a sentence. */

const KEY = "qsharp-key";
const BASE = "../"; // the page is at <server>/playground/

export class ApiError extends Error {
  /**
   * @param message a sentence for people.
   * @param status of the response; 0 where there was none.
   * @param param the field of the request that is wrong; null where none is named.
   */
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The key that was entered; it is kept in this tab alone, until it is closed. */
export const savedKey = () => sessionStorage.getItem(KEY) ?? "";
export const saveKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

async function fetched(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (savedKey()) headers.Authorization = `Bearer ${savedKey()}`;
  let response;
  try {
    response = await fetch(BASE + path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = {};
  try {
    said = (await response.json()).error ?? {};
  } catch {
    // Whatever stands between this page and the server answered in its own way.
  }
  return asSentence(response.status, said);
}

function asSentence(status, said) {
  const why = said.message ? ` It says: ${said.message}` : "";
  const what = {
    400: "The server cannot do this request.",
    401: "The server wants a key: enter one under “Key”.",
    403: "This key may not do that.",
    404: "The server does not have what was asked for.",
    409: "The server is not ready for this.",
    413: "This request is too long for the server.",
    429: "Too many requests: wait a moment and send this again.",
    500: "The server failed while it worked on this request.",
    503: "The server is busy or about to end: try again in a moment.",
  }[status];
  return new ApiError((what ?? `The server answered with status ${status}.`) + why, status, said.param ?? null);
}

/** The answer to a GET, or to a POST of `body`, as JSON. */
export async function json(path, body, signal) {
  const options = body === undefined ? { signal } : { method: "POST", body: JSON.stringify(body), signal };
  return (await fetched(path, options)).json();
}

/**
 * The chunks of a streamed answer.
 *
 * @param body the request; `stream` is added.
 */
export async function* stream(path, body, signal) {
  const response = await fetched(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  while (!ended) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (read.done) break;
    const events = (rest + read.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw asSentence(Number(chunk.error.code) || 500, chunk.error);
      yield chunk;
    }
  }
  if (!ended) throw new ApiError("The answer broke off: the connection to the server was lost.");
}
