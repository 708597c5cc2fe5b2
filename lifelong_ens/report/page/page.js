"use strict";

// What a cell sorts by: its number, else its text; nothing sorts last in both directions.
function valueOf(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
  const text = cell.textContent.trim();
  return text === "–" ? null : text.toLowerCase();
}

function compareValues(a, b) {
  if (a === null || b === null) return 0;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, value: valueOf(row, column) }));
  rows.sort((a, b) => (a.value === null) - (b.value === null) || sign * compareValues(a.value, b.value));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", direction);
  table.tBodies[0].append(...rows.map(({ row }) => row));
}

// Rows, figures and parts of plots of one strategy come and go together.
function toggle(box) {
  const comparison = box.closest(".comparison");
  for (const part of comparison.querySelectorAll(`[data-series="${box.dataset.toggle}"]`)) {
    part.classList.toggle("off", !box.checked);
  }
  const all = [...comparison.querySelectorAll("[data-toggle]")].every((one) => one.checked);
  for (const line of comparison.querySelectorAll(".front")) line.classList.toggle("off", !all);
}

for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
for (const box of document.querySelectorAll("[data-toggle]")) {
  box.addEventListener("change", () => toggle(box));
  toggle(box);  // a browser may remember what was checked
}
