"use strict";
// Sorts tables, tells the values of curves, and wipes between maps. Without it all is still shown.
document.documentElement.classList.add("js");

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function number(text) {
  return parseFloat(text.replaceAll(",", ""));
}

function sort(table, column, head) {
  const body = table.tBodies[0];
  const falls = head.getAttribute("aria-sort") === "ascending";
  const missing = (row) => key(row, column) === "–";
  const rows = [...body.rows].filter((row) => !missing(row));
  const numeric = rows.every((row) => !Number.isNaN(number(key(row, column))));
  rows.sort((one, other) => {
    const [a, b] = [key(one, column), key(other, column)];
    const order = numeric ? number(a) - number(b) : a.localeCompare(b, "en", { numeric: true });
    return falls ? -order : order;
  });
  body.append(...rows, ...[...body.rows].filter(missing)); // what is missing stays last
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column, head));
    head.append(button);
  });
}

for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg");
  const lines = [...chart.querySelectorAll(".line")].map((line) => [...line.children]);
  const points = lines.flat();
  const value = chart.querySelector(".value");
  let [shown, stop] = [points[0], points[0]];

  function show(point) {
    shown.classList.remove("shown");
    point.classList.add("shown");
    value.textContent = point.textContent;
    shown = point;
  }

  function nearest(event) {
    const at = new DOMPoint(event.clientX, event.clientY);
    const { x, y } = at.matrixTransform(svg.getScreenCTM().inverse());
    const far = (point) => Math.hypot(point.cx.baseVal.value - x, point.cy.baseVal.value - y);
    return points.reduce((best, point) => (far(point) < far(best) ? point : best));
  }

  svg.addEventListener("pointermove", (event) => show(nearest(event)));
  svg.addEventListener("pointerdown", (event) => show(nearest(event)));
  svg.addEventListener("focusin", ({ target }) => {
    stop.setAttribute("tabindex", "-1"); // Tab stops once at all the points, where it was last
    target.setAttribute("tabindex", "0");
    stop = target;
    show(target);
  });
  svg.addEventListener("keydown", (event) => {
    const line = lines.findIndex((some) => some.includes(stop));
    const at = lines[line].indexOf(stop);
    const next = {
      ArrowLeft: lines[line][at - 1],
      ArrowRight: lines[line][at + 1],
      ArrowUp: lines[line - 1]?.[at],
      ArrowDown: lines[line + 1]?.[at],
      Home: lines[line][0],
      End: lines[line].at(-1),
    };
    if (!(event.key in next)) return;
    event.preventDefault();
    next[event.key]?.focus();
  });
}

for (const wipe of document.querySelectorAll(".wipe")) {
  const slider = wipe.querySelector("input");
  const show = () => {
    wipe.style.setProperty("--shown", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value}% of the map before the edit`);
  };
  slider.addEventListener("input", show);
  show();
}
