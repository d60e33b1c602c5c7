(() => {
  "use strict";
  const EVERY = 2000, PATIENCE = 8000;
  const shown = new Map();
  let answered = new Date(), timer = 0;

  const say = (text) => { document.getElementById("said").textContent = text; };

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    let copied = false;
    try {
      await navigator.clipboard.writeText(code.textContent);
      copied = true;
    } catch {
      copied = document.execCommand("copy"); // over plain http from another machine there is no clipboard object
    }
    selection.removeAllRanges();
    if (!copied) { selection.addRange(range); }
    button.textContent = copied ? "Copied" : "Selected";
    say(copied ? "The command is copied." : "The command is selected.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }

  const beingRead = (part) => {
    const selection = getSelection();
    return !selection.isCollapsed && part.contains(selection.anchorNode);
  };

  // What changed is replaced, part by part; who tabs through it or selects text keeps their place.
  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const heading = fresh.querySelector("[data-title]"); // before it moves into the page
    for (const part of fresh.querySelectorAll("[data-part]")) {
      const old = document.getElementById(part.id);
      if (!old || shown.get(part.id) === part.outerHTML || beingRead(old)) { continue; }
      shown.set(part.id, part.outerHTML);
      const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
      old.className = part.className;
      old.replaceChildren(...part.childNodes);
      if (focused) { document.getElementById(focused)?.focus({ preventScroll: true }); }
    }
    if (document.title !== heading.dataset.title) {
      document.title = heading.dataset.title;
      document.getElementById("icon").href = heading.dataset.icon;
      say(heading.textContent);
    }
  }

  async function refresh() {
    clearTimeout(timer);
    try {
      const answer = await fetch("/fragment", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
      if (!answer.ok) { throw new Error(answer.status); }
      show(await answer.text());
      answered = new Date();
      lost(false);
    } catch {
      lost(true);
    }
    if (!document.hidden) { timer = setTimeout(refresh, EVERY); }
  }

  function lost(now) {
    const note = document.getElementById("lost");
    document.body.classList.toggle("is-lost", now);
    if (note.hidden === now) { note.hidden = !now; }
    if (now) { document.getElementById("since").textContent = answered.toISOString().slice(11, 19); }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-copy]");
    if (button) { copy(button); }
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && document.getElementById("verdict")) { refresh(); } });
  if (document.getElementById("verdict")) { timer = setTimeout(refresh, EVERY); }
})();
