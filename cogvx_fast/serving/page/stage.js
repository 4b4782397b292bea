// The video in view: on its way with progress, then playing, with what can be done with it.

import * as api from "./api.js";

const element = (id) => document.getElementById(id);
const ENDINGS = { video: "mp4", gif: "gif", webp: "webp" };
const SPOKEN = 25; // percent between two announcements

export const isOver = (job) => job.status === "completed" || job.status === "failed";

/** Say something to those who do not see the page. */
export function announce(text) {
  element("news").textContent = text;
}

export function inWords(seconds) {
  if (seconds < 1) return "a moment";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/**
 * @param changed  told of a job that is another than before
 * @param gone     told the id of one that was deleted
 * @param remixed  told a job that is to be remixed
 * @param failed   told errors that are about no field
 */
export function createStage({ changed, gone, remixed, failed }) {
  const player = element("video");
  const picture = element("picture");
  let job = null;
  let following = new AbortController();
  let pace = null; // since when, and from which step on, this page sees it run
  let spoken = 0;
  let address = null; // of the blob that plays

  function show(next) {
    following.abort();
    following = new AbortController();
    job = next;
    pace = null;
    spoken = 0;
    clear();
    if (!job) return;
    element("frame").style.setProperty("--ratio", job.width / job.height);
    element("frame").style.setProperty("--own-width", `${job.width}px`);
    if (!isOver(job)) {
      drawProgress(job.steps_done, steps(job), job.queue_position, job.eta_seconds);
      follow(job, following.signal);
    }
    draw();
  }

  function clear() {
    if (address) URL.revokeObjectURL(address);
    address = null;
    player.onerror = null;
    player.removeAttribute("src");
    player.load();
    picture.alt = "";
    picture.removeAttribute("src");
    for (const id of ["video", "picture", "progress", "failure", "about-it"]) element(id).hidden = true;
    element("empty").hidden = false;
    element("empty").textContent = "Your video appears here.";
    document.title = "cogvx_fast";
  }

  function draw() {
    const over = isOver(job);
    element("progress").hidden = over;
    element("about-it").hidden = false;
    element("caption").textContent = job.prompt;
    const made = Object.values(job.stage_seconds ?? {}).reduce((sum, seconds) => sum + seconds, 0);
    element("facts").textContent = [
      `${job.width} × ${job.height}`,
      `${job.num_frames} frames at ${job.fps} a second`,
      `${job.num_inference_steps} steps`,
      `guidance ${job.guidance_scale}`,
      `seed ${job.seed}`,
      ...(job.status === "completed" ? [`made in ${inWords(made)}`] : []),
    ].join(" · ");
    element("warnings").replaceChildren(
      ...job.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
    element("downloads").hidden = element("remix").hidden = job.status !== "completed";
    element("failure").hidden = job.status !== "failed";
    if (job.status === "failed") {
      const cancelled = job.error?.code === "cancelled";
      element("failure").textContent = cancelled ? "" : (job.error?.message ?? "No video could be made.");
      element("empty").textContent = cancelled ? "Cancelled." : "No video came of it.";
      picture.hidden = true;
      element("empty").hidden = false;
    }
    document.title = `${over ? "" : "… "}${job.prompt} – cogvx_fast`;
    if (job.status === "completed") play(job);
  }

  async function play(shown) {
    element("empty").textContent = "Loading …";
    try {
      const blob = await api.content(shown.id, "video");
      if (job?.id !== shown.id) return;
      address = URL.createObjectURL(blob);
      player.src = address;
      player.hidden = false;
      picture.hidden = element("empty").hidden = true;
      player.setAttribute("aria-label", shown.prompt);
      player.onerror = () => playAsPicture(shown);
      await player.play();
    } catch (error) {
      // A browser that is told to save power plays when asked to.
      if (error instanceof api.ApiError && job?.id === shown.id) failed(error);
    }
  }

  /** For browsers that are built without H.264. */
  async function playAsPicture(shown) {
    try {
      const blob = await api.content(shown.id, "webp");
      if (job?.id !== shown.id) return;
      URL.revokeObjectURL(address);
      address = URL.createObjectURL(blob);
      picture.src = address;
      picture.className = "";
      picture.alt = shown.prompt;
      picture.hidden = false;
      player.hidden = true;
    } catch (error) {
      failed(error);
    }
  }

  function drawProgress(done, total, position, eta) {
    const percent = (100 * done) / Math.max(1, total);
    const words = [];
    if (position != null) words.push(position ? `Waiting, ${position} before it` : "Waiting, next in turn");
    else if (done < total) words.push(`Step ${done} of ${total}`);
    else words.push("Decoding frames");
    if (eta != null && done < total) words.push(`about ${inWords(eta)} left`);
    element("bar").value = percent;
    element("state").textContent = words.join(" · ");
    element("empty").textContent = position == null ? "It begins with noise …" : "In the queue …";
    const quarter = Math.floor(percent / SPOKEN);
    if (quarter > spoken) announce(`${quarter * SPOKEN} percent`);
    spoken = Math.max(spoken, quarter);
  }

  async function follow(followed, signal) {
    try {
      await api.follow(followed.id, (name, data) => signal.aborted || heard(name, data), signal);
    } catch (error) {
      if (!signal.aborted) failed(error);
    }
  }

  function heard(name, data) {
    if (name === "queued") {
      pace = null;
      job = { ...job, status: "queued", ...data };
      drawProgress(job.steps_done, steps(job), data.queue_position, data.eta_seconds);
    } else if (name === "step") {
      pace ??= { at: performance.now(), done: data.done };
      const made = data.done - pace.done;
      const each = (performance.now() - pace.at) / 1000 / Math.max(1, made);
      const eta = made > 1 ? each * (data.total - data.done) : job.eta_seconds;
      job = { ...job, status: "in_progress", steps_done: data.done, progress: Math.min(99, data.progress) };
      drawProgress(data.done, data.total, null, eta);
    } else if (name === "preview") {
      if (!data.image.startsWith("data:image/")) return;
      picture.src = data.image;
      picture.className = "draft";
      picture.hidden = false;
      element("empty").hidden = true;
    } else if (name === "cut") {
      element("state").textContent = "The connection is cut; asking again …";
    } else if (name === "deleted") {
      gone(job.id);
    } else {
      job = data;
      announce(job.status === "completed" ? "The video is ready and plays." : "No video was made.");
      draw();
    }
    if (job && name !== "cut" && name !== "preview" && name !== "deleted") changed(job);
  }

  const attempt = (button, action) => async () => {
    if (!job || button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    try {
      await action(job);
    } catch (error) {
      failed(error);
    } finally {
      button.ariaBusy = "false";
    }
  };
  const onClick = (button, action) => button.addEventListener("click", attempt(button, action));

  onClick(element("cancel"), (shown) => api.cancel(shown.id));
  onClick(element("delete"), async (shown) => {
    if (!(await confirmed())) return;
    await api.remove(shown.id);
    announce("Deleted.");
    gone(shown.id);
  });
  onClick(element("remix"), (shown) => remixed(shown));
  for (const button of element("downloads").children) {
    onClick(button, async (shown) => {
      save(await api.content(shown.id, button.dataset.variant), nameOf(shown, ENDINGS[button.dataset.variant]));
    });
  }

  return { show, current: () => job };
}

/** How many are made: of a video that starts from another only the last ones. */
function steps(job) {
  return job.strength == null ? job.num_inference_steps : Math.floor(job.num_inference_steps * job.strength);
}

function confirmed() {
  const dialog = element("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function nameOf(job, ending) {
  const words = job.prompt.normalize("NFKD").toLowerCase().match(/[a-z0-9]+/g) ?? ["video"];
  return `${words.join("-").slice(0, 60)}-${job.seed}.${ending}`;
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
