"use strict";
// A click on a heading sorts its table: numbers from high to low first, then the other way; empty cells stay last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, ascending = head.getAttribute("aria-sort") === "descending";
    const key = (row) => row.cells[column].dataset.order;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? String(b).localeCompare(String(a)) : b - a);
    const rows = [...body.rows].sort((one, two) => {
      const [a, b] = [key(one), key(two)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return ascending ? -compare(a, b) : compare(a, b);
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    body.append(...rows);
  });
}
// A click on a name hides or shows the method in every chart.
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const mark = chip.dataset.method, shown = chip.getAttribute("aria-pressed") !== "true";
    for (const same of document.querySelectorAll(`.chip[data-method="${mark}"]`)) same.setAttribute("aria-pressed", shown);
    for (const drawn of document.querySelectorAll(`svg.chart .${mark}`)) drawn.classList.toggle("hidden", !shown);
  });
}
