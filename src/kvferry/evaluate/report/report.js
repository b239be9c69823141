"use strict";
const WIDTH = 760, HEIGHT = 430, LEFT = 48, RIGHT = 14, TOP = 12, BOTTOM = 40;
const sheets = JSON.parse(document.getElementById("data").textContent);

function svg(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function html(name, text, parent, className) {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

const short = (bytes) => bytes >= 1e6 ? `${bytes / 1e6} MB` : bytes >= 1e3 ? `${bytes / 1e3} kB` : `${bytes} B`;
const grouped = (number, digits = 0) =>
  number.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});

function draw(sheet, section) {
  const sizes = sheet.rows.map((row) => Math.log10(Math.max(row.bytes, 1)));
  const low = Math.min(...sizes) - 0.08, high = Math.max(...sizes) + 0.08;
  const x = (bytes) => LEFT + (WIDTH - LEFT - RIGHT) * (Math.log10(Math.max(bytes, 1)) - low) / (high - low || 1);
  const y = (score) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * score / sheet.most;
  const plot = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${sheet.score} over bytes of ${sheet.rows.length} rows; the table below has the figures`},
    section.querySelector(".plot"));
  for (let step = 0; step <= 5; step++) {
    const score = sheet.most * step / 5;
    svg("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(score), y2: y(score)}, plot);
    svg("text", {x: LEFT - 8, y: y(score) + 4, "text-anchor": "end"}, plot, score.toFixed(1));
  }
  for (let power = Math.floor(low); power <= high; power++) {
    for (const step of [1, 2, 5]) {
      const bytes = step * 10 ** power;
      if (Math.log10(bytes) < low || Math.log10(bytes) > high) continue;
      svg("line", {class: "axis", x1: x(bytes), x2: x(bytes), y1: TOP, y2: HEIGHT - BOTTOM}, plot);
      svg("text", {x: x(bytes), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle"}, plot, short(bytes));
    }
  }
  svg("text", {x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle"}, plot,
    "bytes of a question (log)");
  svg("text", {x: LEFT, y: TOP - 2}, plot, sheet.score);
  for (const role of ["ceiling", "floor"]) {
    const row = sheet.rows.find((each) => each.role === role);
    if (!row) continue;
    svg("line", {class: "level", x1: LEFT, x2: WIDTH - RIGHT, y1: y(row.accuracy), y2: y(row.accuracy)}, plot);
    svg("text", {x: WIDTH - RIGHT, y: y(row.accuracy) - 4, "text-anchor": "end"}, plot, role);
  }
  const front = sheet.rows.filter((row) => row.front).sort((a, b) => a.bytes - b.bytes);
  svg("polyline", {class: "front", points: front.map((row) => `${x(row.bytes)},${y(row.accuracy)}`).join(" ")}, plot);
  const bar = svg("line", {class: "bar"}, plot);
  return sheet.rows.map((row) => {
    const mark = svg("circle", {cx: x(row.bytes), cy: y(row.accuracy), r: row.front ? 5 : 4, tabindex: -1,
      class: row.role === "oracle" ? "oracle" : row.front ? "best" : ""}, plot);
    svg("title", {}, mark, row.name);
    return {mark, choose() {
      for (const [key, value] of Object.entries({x1: x(row.bytes), x2: x(row.bytes), y1: y(row.low), y2: y(row.high)}))
        bar.setAttribute(key, value);
      plot.querySelectorAll(".on").forEach((each) => each.classList.remove("on"));
      mark.classList.add("on");
      describe(row, section.querySelector(".card"), sheet);
    }};
  });
}

function describe(row, card, sheet) {
  card.replaceChildren();
  html("b", row.name + (row.role ? ` (${row.role})` : ""), card);
  html("div", `${grouped(row.bytes)} bytes`
    + (row.smaller === null ? "" : `, ${grouped(row.smaller, 1)}x smaller than BF16`), card);
  html("div", `${sheet.score} ${row.accuracy.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}], `
    + (row.of_full === null ? "" : `${(100 * row.of_full).toFixed(1)} % of full: `) + row.against, card);
  if (row.kl !== null) html("div", `KL ${row.kl.toFixed(5)} nats a token`, card);
  if (row.note) html("div", row.note, card);
  if (row.moved !== null) html("div", `attention error ${(100 * row.moved).toFixed(1)} %`, card);
  const kinds = html("div", "", card, "kinds");
  for (const kind of row.kinds) {
    html("span", kind.name, kinds);
    html("i", "", html("span", "", kinds)).style.width = `${100 * kind.mean / sheet.most}%`;
    html("span", kind.mean.toFixed(2), kinds).title = `[${kind.low.toFixed(2)}, ${kind.high.toFixed(2)}], n = ${kind.n}`;
  }
}

function sortable(table) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.dataset.down !== "yes";
    head.dataset.down = down ? "yes" : "no";
    const value = (line) => line.cells[column].dataset.value ?? line.cells[column].textContent;
    const order = (a, b) => isNaN(value(a)) ? value(a).localeCompare(value(b)) : value(a) - value(b);
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  }));
}

document.querySelectorAll("[data-sheet]").forEach((section) => {
  const sheet = sheets[Number(section.dataset.sheet)];
  const marks = draw(sheet, section);
  for (const {mark, choose} of marks) mark.addEventListener("pointerenter", choose);
  section.querySelectorAll("[data-row]").forEach((line) =>
    line.addEventListener("click", marks[Number(line.dataset.row)].choose));
  sortable(section.querySelector("table"));
  const good = sheet.rows.map((row, index) => [row, index]).filter(([row]) => row.front && row.of_full >= 0.98);
  const [, first] = good.sort(([a], [b]) => a.bytes - b.bytes)[0] ?? [null, 0];
  marks[first].choose();
});
