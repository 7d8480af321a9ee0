"use strict";

// Theme: the system's, until the reader chooses the other one.
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.getElementById("theme");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

function announceTheme() {
  themeButton.textContent = isDark() ? "Light" : "Dark";
  document.dispatchEvent(new Event("theme"));
}

themeButton.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  announceTheme();
});
systemIsDark.addEventListener("change", announceTheme);

// Tables: a click on a heading sorts, a second one turns the order round.
function sortKey(cell) {
  const data = cell.querySelector("data");
  return data ? Number(data.value) : cell.textContent.trim();
}

function compareCells(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  // What is missing stays together, after the numbers.
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, undefined, {numeric: true});
}

function sortTable(heading) {
  const body = heading.closest("table").tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  const key = (row) => sortKey(row.cells[heading.cellIndex]);
  const rows = [...body.rows].sort((a, b) => compareCells(key(a), key(b)));
  body.append(...(down ? rows.reverse() : rows));
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const heading of document.querySelectorAll("table.sortable th[scope=col]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sortTable(heading));
  heading.append(button);
}

// Bars of the layers: weights, multiplications or time.
for (const radio of document.querySelectorAll("input[name=metric]")) {
  radio.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-metric]")) part.hidden = part.dataset.metric !== radio.value;
  });
}

// Folded tables are printed too, and folded again afterwards.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-printed]")) {
    details.open = false;
    delete details.dataset.printed;
  }
});

announceTheme();
