// The videos that there are, newest first, a page after the other.

import * as api from "./api.js";
import { isOver } from "./stage.js";

const PAGE = 12;
const MOST = 100; // that the API lists at once
const LOOK = 2000; // ms between two looks at jobs that have not ended

const element = (id) => document.getElementById(id);

/**
 * @param opened  told a job that is to be shown
 * @param failed  told errors
 */
export function createGallery({ opened, failed }) {
  const cards = new Map(); // of a job's id: its job and elements, in the order of the page
  const list = element("gallery");
  let last = null; // the id behind which older ones are
  let shown = null;

  function put(job, first = true) {
    let card = cards.get(job.id);
    if (!card) {
      card = makeCard(job.id);
      cards.set(job.id, card);
      list[first ? "prepend" : "append"](card.item);
    }
    const before = card.job?.status;
    card.job = job;
    card.words.textContent = job.prompt;
    const states = { queued: "waiting", in_progress: `${job.progress}%`, completed: "" };
    card.state.textContent = states[job.status] ?? (job.error?.code === "cancelled" ? "cancelled" : "failed");
    card.state.hidden = job.status === "completed";
    if (job.status === "completed" && before !== "completed") drawPicture(card);
    element("past").hidden = false;
  }

  function makeCard(id) {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", className: "card" });
    const frame = Object.assign(document.createElement("span"), { className: "thumb" });
    const image = Object.assign(document.createElement("img"), { alt: "", hidden: true });
    const state = Object.assign(document.createElement("span"), { className: "state" });
    const words = Object.assign(document.createElement("span"), { className: "words" });
    frame.append(image, state);
    button.append(frame, words);
    button.addEventListener("click", () => opened(cards.get(id).job));
    item.append(button);
    return { item, button, image, state, words, job: null };
  }

  async function drawPicture(card) {
    try {
      const address = URL.createObjectURL(await api.content(card.job.id, "thumbnail"));
      card.image.src = address;
      card.image.hidden = false;
      card.image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
    } catch (error) {
      if (error.status !== 404) failed(error);
    }
  }

  async function load() {
    const page = await api.list(PAGE, last);
    for (const job of page.data) put(job, false);
    last = page.last_id ?? last;
    element("older").hidden = !page.has_more;
    return page.data;
  }

  function clear() {
    cards.clear();
    list.replaceChildren();
    last = null;
    element("past").hidden = true;
  }

  function remove(id) {
    const card = cards.get(id);
    if (!card) return null;
    const neighbour = card.item.nextElementSibling ?? card.item.previousElementSibling;
    card.item.remove();
    cards.delete(id);
    // What is listed behind a job that is gone is not found: behind its neighbour, then.
    if (id === last) last = [...cards.values()].at(-1)?.job.id ?? null;
    element("past").hidden = cards.size === 0;
    return [...cards.values()].find((other) => other.item === neighbour)?.job ?? null;
  }

  function select(id) {
    cards.get(shown)?.button.removeAttribute("aria-current");
    shown = id;
    cards.get(id)?.button.setAttribute("aria-current", "true");
  }

  /** Jobs that are not in view have no stream of events: a browser holds few connections. */
  async function look() {
    const open = (id) => cards.has(id) && !isOver(cards.get(id).job) && id !== shown;
    if (document.hidden || ![...cards.keys()].some(open)) return;
    for (const job of (await api.list(MOST)).data) {
      if (open(job.id)) put(job);
    }
  }
  (async () => {
    for (;;) {
      await new Promise((done) => setTimeout(done, LOOK));
      await look().catch(() => {}); // looked at again
    }
  })();

  element("older").addEventListener("click", async () => {
    const before = list.lastElementChild;
    try {
      await load();
      before?.nextElementSibling?.querySelector("button").focus();
    } catch (error) {
      failed(error);
    }
  });

  return { put, load, clear, remove, select };
}
