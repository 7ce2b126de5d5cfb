// The page of demo.py: shows what the server sends, sends what the visitor does. Text is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const ENDS = { lap: "Lap finished", field: "Left the playfield", time: "Time is up" };
const pressed = new Set();
const LASTING = ["drivers", "track", "pause", "attention"];  // commands that hold until the next of their kind
const wanted = {};  // the last of each and what is in force, for the server to hear again when it comes back
let socket, known, drivers = ["policy"], full = false;

function send(command, value) {
  if (LASTING.includes(command)) wanted[command] = value;
  transmit(command, value);
}

function transmit(command, value) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ [command]: value }));
}

// a page that nobody sees drives on when it is seen again
function pauseUnseen() {
  transmit("pause", document.hidden || Boolean(wanted.pause));
}

function connect() {
  const address = new URL("drive", location.href);
  address.protocol = address.protocol.replace("http", "ws");
  socket = new WebSocket(address);
  socket.onmessage = (event) => receive(JSON.parse(event.data));
  socket.onclose = () => {
    if (!full) status("not connected; trying again …");
    full = false;
    setTimeout(connect, 3000);
  };
}

function status(text) {
  if ($("status").textContent !== text) $("status").textContent = text;  // a screen reader says it again
}

function receive(message) {
  if ("full" in message) {
    full = true;
    status(`${message.full} visitors are driving, as many as this server takes; you are let in when one leaves`);
  } else if ("answers" in message) {
    begin(message);
  } else if ("drives" in message) {
    show(message);
  } else if ("asked" in message) {
    reply(message);
  } else if ("note" in message) {
    $("note").textContent = message.note;
  }
}

function begin(message) {
  const again = known !== undefined;
  known = message;
  status("driving");
  $("sentence").maxLength = $("question").maxLength = message.max_text;
  for (const [command, value] of Object.entries(wanted)) transmit(command, value);
  transmit("keys", [...pressed]);
  pauseUnseen();
  if (again) return;
  for (const [name, title] of Object.entries(message.drivers)) {
    $("first").add(new Option(title, name));
    $("second").add(new Option(title, name));
  }
  for (const sentence of message.instructions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sentence;
    button.onclick = () => { $("sentence").value = sentence; send("say", sentence); };
    $("instructions").append(button);
  }
  for (const question of message.questions) $("questions").append(new Option(question));
}

// one panel for each drive, made anew only when their number changes
function panels(count) {
  const stage = $("stage");
  while (stage.children.length > count) stage.lastElementChild.remove();
  while (stage.children.length < count) {
    const panel = $("panel").content.cloneNode(true).firstElementChild;
    for (const answer of known.answers) {
      const name = document.createElement("span"), meter = document.createElement("meter"), value = document.createElement("span");
      name.textContent = answer;
      meter.setAttribute("aria-label", answer);
      panel.querySelector(".bars").append(name, meter, value);
    }
    for (const key of panel.querySelectorAll("[data-key]")) {
      key.onpointerdown = () => press(key.dataset.key, true);
      key.onpointerup = key.onpointerleave = key.onpointercancel = () => press(key.dataset.key, false);
      key.onclick = (event) => tap(key.dataset.key, event);
    }
    stage.append(panel);
  }
  return [...stage.children];
}

function show(message) {
  panels(message.drives.length).forEach((panel, i) => showDrive(panel, message.drives[i]));
  wanted.say = message.told;
  $("told").textContent = message.told || "nothing";
  $("nothing").hidden = !message.told;
  $("pause").setAttribute("aria-pressed", message.paused);
  if (document.activeElement !== $("track")) $("track").value = message.track;
  drivers = message.drives.map((drive) => drive.driver);
  if (document.activeElement !== $("first")) $("first").value = drivers[0];
  if (document.activeElement !== $("second")) $("second").value = drivers[1] || "";
  if (document.hidden) send("seen", true);
  else requestAnimationFrame(() => send("seen", true));
}

function showDrive(panel, drive) {
  const find = (name) => panel.querySelector(name);
  find("img").src = `data:image/jpeg;base64,${drive.picture}`;
  find("img").alt = `the car of ${known.drivers[drive.driver]} from above`;
  find(".name").textContent = known.drivers[drive.driver];
  find(".keys").hidden = drive.driver !== "you";
  find(".answer").hidden = !drive.answer;
  find(".answer").textContent = drive.answer || "";
  find(".action").textContent = drive.action ? `${drive.differs ? "but it does: " : "action: "}${drive.action}` : "";
  find(".action").classList.toggle("differs", Boolean(drive.differs));
  find(".scene").textContent = drive.scene;
  find(".bars").hidden = !drive.probabilities;
  (drive.probabilities || []).forEach((p, i) => {
    const [name, meter, value] = [...find(".bars").children].slice(3 * i, 3 * i + 3);
    name.classList.toggle("taken", known.answers[i] === drive.action);
    meter.value = p;
    value.textContent = p.toFixed(2);
  });
  find(".speed").textContent = drive.speed.toFixed(0);
  find(".return").textContent = drive.return.toFixed(0);
  find(".lap").textContent = `${(100 * drive.lap).toFixed(0)} %`;
  find(".end").hidden = !drive.end;
  find(".end").textContent = drive.end ? `${ENDS[drive.end]}: ${drive.return.toFixed(0)} points` : "";
}

function reply(message) {
  const question = document.createElement("dt"), answer = document.createElement("dd");
  question.textContent = message.asked + (message.speed === null ? "" : ` (asked at speed ${message.speed})`);
  answer.textContent = [message.reply, message.by && `(${message.by})`, message.note].filter(Boolean).join(" ");
  $("replies").prepend(question, answer);
  while ($("replies").children.length > 20) $("replies").lastElementChild.remove();
}

function choose(first, second) {
  drivers = second ? [first, second] : [first];
  release();
  send("drivers", drivers);
  freeKeys(document.activeElement);
}

// whoever drives wants the arrow keys back from a field
function freeKeys(field) {
  if (drivers.includes("you")) field.blur(); else if (field.select) field.select();
}

function press(key, down) {
  if (pressed.has(key) === down) return;
  if (down) pressed.add(key); else pressed.delete(key);
  send("keys", [...pressed]);
}

function release() {
  for (const key of [...pressed]) press(key, false);
}

// a key button worked by the keyboard or a screen reader: a short press
function tap(key, event) {
  if (event.detail !== 0) return;
  press(key, true);
  setTimeout(() => press(key, false), 200);
}

$("say").onsubmit = (event) => {
  event.preventDefault();
  send("say", $("sentence").value);
  freeKeys($("sentence"));
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  if ($("question").value.trim()) send("ask", $("question").value);
  freeKeys($("question"));
};
$("nothing").onclick = () => { $("sentence").value = ""; send("say", ""); };
$("first").onchange = $("second").onchange = () => choose($("first").value, $("second").value);
$("compare").onclick = () => choose("answers", "policy");
$("race").onclick = () => choose("you", "policy");
$("track").onchange = () => {
  if (!$("track").value) return;
  const track = Math.floor(Number($("track").value));
  $("track").value = Math.min(Math.max(track, $("track").min), $("track").max);
  send("track", Number($("track").value));
};
$("track").onkeydown = (event) => { if (event.key === "Enter") $("track").blur(); };
$("random").onclick = () => send("track", 202000 + Math.floor(Math.random() * 98000));  // neither trained nor tested on
$("restart").onclick = () => send("restart", true);
$("pause").onclick = () => send("pause", $("pause").getAttribute("aria-pressed") !== "true");
$("attention").onchange = () => send("attention", $("attention").checked);

const typing = () => ["INPUT", "SELECT"].includes(document.activeElement.tagName) && document.activeElement.type !== "checkbox";
for (const [kind, down] of [["keydown", true], ["keyup", false]]) {
  addEventListener(kind, (event) => {
    if (!event.key.startsWith("Arrow")) return;
    const modified = event.altKey || event.ctrlKey || event.metaKey;
    if (down && (typing() || modified || !drivers.includes("you"))) return;  // but a key that is let go always counts
    event.preventDefault();
    press(event.key, down);
  });
}
addEventListener("blur", release);
document.addEventListener("visibilitychange", pauseUnseen);

connect();
