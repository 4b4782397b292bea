// The page as a whole: opens with a key where one is needed, and brings form, stage and gallery together.

import * as api from "./api.js";
import { createForm } from "./form.js";
import { createGallery } from "./gallery.js";
import { createStage, isOver } from "./stage.js";

const READY = 2000; // ms between two looks whether the model is loaded

const element = (id) => document.getElementById(id);

const stage = createStage({ changed: (job) => gallery.put(job), gone, remixed: (job) => form.remix(job), failed });
const gallery = createGallery({ opened: (job) => open(job), failed });
const form = createForm({ made, failed });

function open(job) {
  trouble("");
  // Kept in the address, so that it is found again when the page is loaded anew.
  history.replaceState(null, "", job ? `#${job.id}` : location.pathname + location.search);
  stage.show(job);
  gallery.select(job?.id ?? null);
  bringIntoView();
}

function made(job) {
  gallery.put(job);
  open(job);
}

function gone(id) {
  const next = gallery.remove(id);
  if (form.remixing() === id) form.remix(null);
  if (stage.current()?.id === id) {
    open(next);
    (document.querySelector(".card[aria-current]") ?? element("prompt")).focus({ preventScroll: true });
  }
}

/** On a narrow page the video is above the form and the others. */
function bringIntoView() {
  const { top, bottom } = element("theatre").getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) element("stage").scrollIntoView({ block: "start" });
}

function failed(error) {
  if (error.status === 401) askForKey();
  else if (error instanceof api.ApiError) trouble(error.message);
  else throw error;
}

function trouble(text) {
  element("trouble").textContent = text;
  element("trouble").hidden = !text;
}

function askForKey() {
  element("key-error").textContent = api.key() ? "This key is none of this server." : "";
  api.setKey("");
  stage.show(null);
  gallery.clear();
  element("main").hidden = element("forget").hidden = true;
  element("key-form").hidden = false;
  element("key").value = "";
  element("key").focus();
}

async function start() {
  trouble("");
  const about = await api.about();
  if (about.key_needed) return askForKey();
  element("key-form").hidden = true;
  element("forget").hidden = !api.key();
  element("main").hidden = false;
  form.offer(about.models);
  sayReady(about);
  gallery.clear();
  const jobs = await gallery.load();
  const wanted = location.hash.slice(1);
  let job = jobs.find(({ id }) => id === wanted);
  if (!job && wanted.startsWith("video_")) {
    job = await api.video(wanted).catch(() => undefined);
    if (job) gallery.put(job, false);
  }
  job ??= jobs.find((other) => !isOver(other)) ?? jobs.find(({ status }) => status === "completed");
  if (job) {
    stage.show(job);
    gallery.select(job.id);
  }
}

function sayReady(about) {
  const names = about.models.map(({ id }) => id).join(", ");
  element("served").textContent = about.ready ? names : `${names} (loading …)`;
  if (about.ready) return;
  setTimeout(() => api.about().then((next) => !next.key_needed && sayReady(next), () => sayReady(about)), READY);
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(element("key").value.trim());
  start().catch(failed);
});
element("forget").addEventListener("click", () => {
  api.setKey("");
  askForKey();
});
start().catch(failed);
