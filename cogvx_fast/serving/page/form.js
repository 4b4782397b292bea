// What is asked for: fields with what the server offers, its errors at the fields that they name, remixes.

import * as api from "./api.js";

const element = (id) => document.getElementById(id);
// Fields that the page calls otherwise than an error may.
const SHOWN_AT = { size: "width", seconds: "num_frames" };

/**
 * @param made    told the job that a request has become
 * @param failed  told errors that are about no field
 */
export function createForm({ made, failed }) {
  const form = element("composer");
  let offered = [];
  let model = null; // what the server says of the one that is chosen
  let original = null; // the job that is remixed

  function offer(models) {
    offered = models;
    fill(element("model"), models.map(({ id }) => [id, id]));
    element("model-field").hidden = models.length < 2;
    element("model").onchange = () => choose(models.find(({ id }) => id === element("model").value));
    choose(models[0]);
  }

  function choose(chosen) {
    model = chosen;
    const limits = {
      width: { min: model.multiple, step: model.multiple, max: model.max_width, value: model.width },
      height: { min: model.multiple, step: model.multiple, max: model.max_height, value: model.height },
      fps: { max: model.max_fps, value: model.fps },
      num_inference_steps: { max: model.max_steps, value: model.num_inference_steps },
      guidance_scale: { max: model.max_guidance, value: model.guidance_scale },
    };
    for (const [name, values] of Object.entries(limits)) {
      for (const [attribute, value] of Object.entries(values)) element(name)[attribute] = value ?? "";
    }
    element("width").readOnly = element("height").readOnly = model.fixed_size;
    fill(element("num_frames"), model.frame_choices.map((frames) => [frames, ""]), model.num_frames);
    fill(element("scheduler"), [["", "the model's own"], ...model.schedulers.map((name) => [name, name])]);
    fill(element("engine"), model.engines.map((name) => [name, name]));
    const { kinds, required } = model.reference;
    element("reference").hidden = !kinds.length;
    element("reference-label").textContent =
      `${required ? "The" : "Start from a"} ${kinds.join(" or ")}${required ? " to start from" : ""}`;
    element("input_reference").accept = kinds.map((kind) => `${kind}/*`).join(",");
    element("strength").value = model.reference.strength;
    element("examples").replaceChildren(...model.examples.map(example));
    if (!element("prompt").value) element("prompt").placeholder = model.examples[0] ?? "";
    summarize();
  }

  function example(text) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      element("prompt").value = text;
      element("prompt").focus();
    });
    return button;
  }

  function summarize() {
    const fps = Number(element("fps").value) || model.fps;
    for (const option of element("num_frames").options) {
      const seconds = Number((((option.value - 1) / fps).toFixed(2)));
      option.textContent = `${seconds} s (${option.value} frames)`;
    }
    element("summary").textContent =
      `${element("width").value} × ${element("height").value}, ${element("num_inference_steps").value} steps`;
    element("strength-says").textContent = `${Math.round(100 * element("strength").value)}%`;
  }

  // References: a preview of what is uploaded.
  function chosen() {
    const [file] = element("input_reference").files;
    for (const id of ["chosen-video", "chosen-picture"]) {
      const shown = element(id);
      if (shown.src) URL.revokeObjectURL(shown.src);
      shown.removeAttribute("src");
      shown.hidden = !file?.type.startsWith(id === "chosen-video" ? "video/" : "image/");
      if (!shown.hidden) shown.src = URL.createObjectURL(file);
    }
    element("chosen").hidden = !file;
    element("strength-field").hidden = !isVideo(file);
  }
  const isVideo = (file) => Boolean(file && !file.type.startsWith("image/"));

  // Remixes: another prompt, all else stays.
  function remix(job) {
    original = job;
    for (const part of form.querySelectorAll(".for-new")) part.hidden = Boolean(job);
    const kinds = offered.find(({ id }) => id === job?.model)?.reference.kinds ?? [];
    element("remixing").hidden = !job;
    element("origin-field").hidden = !kinds.includes("video"); // one that starts from pictures cannot from a video
    element("origin").value = "noise";
    element("make").textContent = job ? "Make remix" : "Make video";
    clearErrors();
    if (job) {
      element("remixed").textContent = job.prompt;
      element("prompt").value = job.prompt;
      element("strength-field").hidden = true;
      element("prompt").focus();
      element("prompt").select();
    } else if (model) {
      element("reference").hidden = !model.reference.kinds.length;
      chosen();
    }
  }

  // Errors.
  function clearErrors() {
    element("form-error").textContent = "";
    for (const field of form.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-describedby");
      element(`${field.id}-error`).remove();
    }
  }

  function complain(name, message) {
    const field = form.elements[SHOWN_AT[name] ?? name];
    if (!field?.name || field.closest("[hidden]")) {
      element("form-error").textContent = message;
      return;
    }
    field.closest("details")?.setAttribute("open", "");
    const note = Object.assign(document.createElement("p"), { className: "error", id: `${field.id}-error` });
    note.textContent = message;
    field.after(note);
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", note.id);
    field.focus();
  }

  function values() {
    const data = new FormData();
    for (const field of form.elements) {
      if (!field.name || field.type === "file" || !field.value.trim() || field.closest("[hidden]")) continue;
      data.set(field.name, field.name === "seed" ? field.value.trim() : field.value);
    }
    const [file] = element("input_reference").files;
    if (file) data.set("input_reference", file);
    if (!isVideo(file)) data.delete("strength");
    return data;
  }

  function askRemix() {
    const body = { prompt: element("prompt").value };
    if (element("origin").value === "video") body.strength = Number(element("strength").value);
    return api.remix(original.id, body);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = element("make");
    if (button.ariaBusy === "true") return;
    clearErrors();
    const unread = [...form.elements].find((field) => field.validity?.badInput);
    if (unread) return complain(unread.name, unread.validationMessage);
    if (!element("prompt").value.trim()) return complain("prompt", "Say what the video shows.");
    button.ariaBusy = "true";
    try {
      const job = await (original ? askRemix() : api.create(values()));
      if (original) remix(null);
      made(job);
    } catch (error) {
      if (error instanceof api.ApiError && error.status !== 401) complain(error.param, error.message);
      else failed(error);
    } finally {
      button.ariaBusy = "false";
    }
  });
  form.addEventListener("input", summarize);
  element("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  element("input_reference").addEventListener("change", chosen);
  element("no-reference").addEventListener("click", () => {
    element("input_reference").value = "";
    chosen();
    element("input_reference").focus();
  });
  element("origin").addEventListener("change", () => {
    element("strength-field").hidden = element("origin").value !== "video";
  });
  element("no-remix").addEventListener("click", () => {
    remix(null);
    element("prompt").focus();
  });

  return { offer, remix, remixing: () => original?.id ?? null };
}

function fill(select, choices, value = choices[0]?.[0]) {
  select.replaceChildren(...choices.map(([choice, text]) => new Option(text, choice)));
  select.value = value;
}
