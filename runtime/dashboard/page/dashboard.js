// Reads the server's states as they change, shows one session, and sends what the operator says.

import { drawAbove, drawLatency, drawPath3d } from "./charts.js";

const FRAMES_PER_SECOND = 16, KEPT_ENDED = 8;
const element = (id) => document.getElementById(id);
const flights = new Map();
let shownUid = "", key = sessionStorage.getItem("worldvln-key") || "";
let turn = -0.6, tilt = 0.55, predicted = null, shownFrame = "", shownSegment = "";
let isFollowing = false, isConnected = false;

function headers(more) {
  return key ? { ...more, Authorization: `Api-Key ${key}` } : { ...more };
}

async function refusal(response) {
  try {
    return (await response.json()).detail;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function link(text, kind) {
  element("link").textContent = text;
  element("link").className = `pill ${kind}`;
}

async function follow() {
  if (isFollowing) return;
  isFollowing = true;
  for (;;) {
    // The server says something at least every 5 s. A connection that does not is given up, and its place with it.
    const listening = new AbortController();
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => listening.abort(new Error("the server is silent")), 15000);
    };
    try {
      heard();
      const response = await fetch("api/states", { headers: headers(), cache: "no-store", signal: listening.signal });
      if (response.status === 401) {
        isFollowing = false;
        return askForKey(key ? await refusal(response) : "");
      }
      if (!response.ok) throw new Error(await refusal(response));
      element("key-form").hidden = true;
      flights.clear();
      isConnected = true;
      await readLines(response.body.getReader(), heard);
      throw new Error("the server closed the connection");
    } catch (error) {
      isConnected = false;
      link(`no connection: ${error.message}`, "down");
      enable(false);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    } finally {
      clearTimeout(silence);
      listening.abort();
    }
  }
}

async function readLines(reader, heard) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) JSON.parse(line).forEach((flight) => flights.set(flight.uid, flight));
    forgetOld();
    show();
  }
}

/** The server forgets sessions that ended, and does not say so. */
function forgetOld() {
  const ended = [...flights.values()].filter((flight) => flight.ended && flight.uid !== shownUid);
  for (const flight of ended.slice(0, Math.max(0, ended.length - KEPT_ENDED))) flights.delete(flight.uid);
}

function askForKey(why) {
  link("a key is needed", "down");
  element("key-error").textContent = why;
  element("key-form").hidden = false;
  element("key").focus();
}

function chosen() {
  const open = [...flights.values()].filter((flight) => !flight.ended);
  const stays = flights.get(shownUid);
  // A flight that has just ended stays until another one is there.
  if (stays && (!stays.ended || !open.length)) return stays;
  return open[open.length - 1] || [...flights.values()].pop();
}

function enable(on) {
  for (const id of ["hold", "resume", "prompt", "send"]) element(id).disabled = !on;
}

function show() {
  const flight = chosen();
  if (!flight) {
    link("connected, no session", "up");
    enable(false);
    return;
  }
  if (flight.uid !== shownUid) {
    shownUid = flight.uid;
    predicted = null;
    shownFrame = shownSegment = "";
    element("prompt").value = flight.prompt;
  }
  const options = [...flights.values()].map((each) => {
    const option = new Option(`${each.prompt.slice(0, 40) || "(no instruction)"}${each.ended ? ` (${each.ended})` : ""}`);
    option.value = each.uid;
    option.selected = each.uid === shownUid;
    return option;
  });
  if (document.activeElement !== element("sessions")) element("sessions").replaceChildren(...options);
  if (!isConnected) enable(false);
  else if (flight.ended) link(`session ${flight.ended}`, "");
  else if (flight.is_held) link("held by operator", "held");
  else link(flight.is_done ? "flown" : "flying", "up");
  element("progress").textContent =
    `frame ${flight.frames} of ${flight.frames_total}, segment ${flight.emitted + 1} of ${flight.segments}` +
    (flight.profile ? `, ${flight.profile}` : "");
  enable(isConnected && !flight.ended);
  element("hold").disabled ||= flight.is_held;
  element("resume").disabled ||= !flight.is_held;
  if (document.activeElement !== element("prompt")) element("prompt").value = flight.prompt;
  draw(flight);
  showNotes(flight);
  showCamera(flight);
  showPredicted(flight);
}

function draw(flight) {
  drawAbove(element("above"), flight);
  drawPath3d(element("path3d"), flight, turn, tilt);
  drawLatency(element("latency"), flight);
  const last = flight.times[flight.times.length - 1];
  const stages = Object.entries(flight.stages_ms).map(([name, ms]) => `${name} ${ms.toFixed(1)}`);
  element("latency-note").textContent = last ? `last ${last.total.toFixed(0)} ms` : "ms";
  element("latency-note").title = stages.join(", ");
}

function showNotes(flight) {
  element("notes-count").textContent = flight.notes.length ? `${flight.notes.length}` : "none";
  const rows = [...flight.notes].reverse().map((note) => {
    const row = document.createElement("li"), kind = document.createElement("b");
    kind.textContent = note.kind;
    row.append(kind, `segment ${note.segment}: ${note.reason}`);
    return row;
  });
  element("notes").replaceChildren(...rows);
}

/** The picture and the answer that it came with; null where there is none, or the link is too bad for it. */
async function picture(url) {
  try {
    const response = await fetch(url, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(30000) });
    return response.status === 200 ? { response, blob: await response.blob() } : null;
  } catch {
    return null;
  }
}

/** Does one thing at a time; of what is asked for in the meantime, the last is done next. A slow link skips frames. */
function newest(work) {
  let isBusy = false, waiting = null;
  return async (flight) => {
    waiting = flight;
    if (isBusy) return;
    isBusy = true;
    try {
      while (waiting) {
        const next = waiting;
        waiting = null;
        await work(next);
      }
    } finally {
      isBusy = false;
    }
  };
}

const showCamera = newest(async (flight) => {
  const wanted = `${flight.uid} ${flight.frames}`;
  if (wanted === shownFrame || !flight.frames) return;
  shownFrame = wanted;
  const found = await picture(`api/${flight.uid}/frame`);
  if (!found || flight.uid !== shownUid) return;
  const before = element("camera").src;
  element("camera").src = URL.createObjectURL(found.blob);
  if (before.startsWith("blob:")) URL.revokeObjectURL(before);
  element("camera-note").textContent = `frame ${flight.frames}`;
});

const showPredicted = newest(async (flight) => {
  const wanted = `${flight.uid} ${flight.emitted}`;
  if (wanted === shownSegment || flight.emitted < 0) return;
  shownSegment = wanted;
  const found = await picture(`api/${flight.uid}/predicted`);
  const strip = found && (await createImageBitmap(found.blob).catch(() => null));
  if (flight.uid !== shownUid) return;
  if (predicted) predicted.strip.close();
  predicted = null;
  element("predicted-note").textContent = "this server shows none";
  if (!strip) return;
  const count = Number(found.response.headers.get("x-frames"));
  predicted = { strip, count, since: performance.now() };
  element("predicted-note").textContent = `${count} frames of segment ${flight.emitted}`;
  element("predicted").dataset.segment = flight.emitted;
});

/** Plays the predicted frames over and over, at the model's speed, with half a second of rest. */
function play() {
  if (predicted) {
    const canvas = element("predicted"), { strip, count, since } = predicted;
    const at = Math.floor(((performance.now() - since) / 1000) * FRAMES_PER_SECOND) % (count + FRAMES_PER_SECOND / 2);
    const frame = Math.min(at, count - 1), width = strip.width / count;
    canvas.width = width;
    canvas.height = strip.height;
    canvas.getContext("2d").drawImage(strip, frame * width, 0, width, strip.height, 0, 0, width, strip.height);
  }
  requestAnimationFrame(play);
}

async function steer(command, words) {
  const said = element("said");
  said.textContent = `${words} ...`;
  try {
    const response = await fetch(`api/${shownUid}`, {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(command),
    });
    said.textContent = response.ok ? `${words}: from the next segment on` : await refusal(response);
  } catch (error) {
    said.textContent = `${words}: not sent (${error.message})`;
  }
}

element("hold").addEventListener("click", () => steer({ hold: true }, "hold"));
element("resume").addEventListener("click", () => steer({ hold: false }, "resume"));
element("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  element("prompt").blur();
  steer({ prompt: element("prompt").value }, "new instruction");
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = element("key").value;
  sessionStorage.setItem("worldvln-key", key);
  follow();
});
element("sessions").addEventListener("change", (event) => {
  shownUid = "";
  const flight = flights.get(event.target.value);
  if (flight) {
    flights.delete(flight.uid); // the last one is shown
    flights.set(flight.uid, flight);
    shownUid = flight.uid;
    predicted = null;
    shownFrame = shownSegment = "";
  }
  event.target.blur();
  show();
});
element("path3d").addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  turn += event.movementX / 150;
  tilt = Math.min(1.4, Math.max(0.1, tilt + event.movementY / 200));
  if (flights.get(shownUid)) drawPath3d(element("path3d"), flights.get(shownUid), turn, tilt);
});
window.addEventListener("resize", () => flights.get(shownUid) && draw(flights.get(shownUid)));

play();
follow();
