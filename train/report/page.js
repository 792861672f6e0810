"use strict";
// Glue between the plots (plotly), the table and the detail of one example. Everything from the data goes into the page
// as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byKey = Object.fromEntries(data.columns.map((column) => [column.key, column]));
const ROWS = 25, SUSPECTS = 30;
const INK = "#24292f", COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#8c564b",
  "#17becf", "#bcbd22"];
const FONT = { color: INK, family: "system-ui, sans-serif" };
const BUTTONS = ["zoom2d", "pan2d", "select2d", "lasso2d", "resetScale2d"];
const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [BUTTONS] };
const everyone = Array.from({ length: data.count }, (_, i) => i);
const state = { sort: data.rank, descending: true, page: 0, selected: null, kept: null, rows: everyone };

function find(id) { return document.getElementById(id); }

function make(tag, properties = {}, ...children) {
  const { className = "", ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function number(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function labelOf(i) { return data.labels ? data.classes[data.labels[i]] : ""; }
function predictedOf(i) { return data.predicted ? data.classes[data.predicted[i]] : ""; }
function isWrong(i) { return data.predicted && data.predicted[i] !== data.labels[i]; }

// The picture of an example, `size` pixels wide on the page, or nothing.
function tile(i, size) {
  if (!data.sheets) return "";
  const { columns, per } = data.sheets, place = i % per;
  const element = make("div", { className: `tile sheet${Math.floor(i / per)}` });
  const rows = Math.ceil(Math.min(per, data.count - i + place) / columns);
  element.style.cssText = `width:${size}px;height:${size}px;box-sizing:content-box;` +
    `background-size:${columns * size}px ${rows * size}px;` +
    `background-position:${-(place % columns) * size}px ${-Math.floor(place / columns) * size}px`;
  return element;
}

function labels(i) {
  if (!data.labels) return "";
  const out = make("div", {}, labelOf(i));
  if (data.predicted) out.append(" → ", make("span", { className: isWrong(i) ? "wrong" : "" }, predictedOf(i)));
  if (data.known && data.known[i]) out.append(make("span", { className: "mark" }, "flipped"));
  return out;
}

function text(i, clamp = false) {
  return data.texts ? make("div", { className: clamp ? "text clamp" : "text" }, data.texts[i]) : "";
}

function figures(i) {
  const list = make("dl");
  for (const column of data.columns) list.append(make("dt", {}, column.title), make("dd", {}, number(column.values[i])));
  return list;
}

function card(i, size, ...more) {
  const body = make("div", {}, labels(i), make("div", { className: "hint" }, data.texts ? "" : data.names[i]), text(i, true), ...more);
  const out = make("div", { className: "card" }, tile(i, size), body);
  out.addEventListener("click", () => keep(i));
  return out;
}

// The detail of an example beside the plots, with its nearest neighbours in gradient space.
function show(i) {
  const detail = find("detail");
  if (i === null) {
    detail.replaceChildren(make("p", { className: "hint" }, "No example yet."));
    return;
  }
  detail.replaceChildren(make("div", { className: "name" }, data.names[i]), tile(i, 112), labels(i), text(i), figures(i));
  if (!data.neighbours) return;
  const near = make("div", { className: data.texts ? "nearest texts" : "nearest" });
  data.neighbours[i].forEach((j, place) => {
    if (j === null) return;
    const one = make("div", { title: data.texts ? data.texts[j] : data.names[j] }, tile(j, 44), labels(j),
      `cos ${number(data.cosines[i][place])}`, text(j, true));
    one.addEventListener("click", () => keep(j));
    near.append(one);
  });
  detail.append(make("div", {}, "Most alike in their gradients"), near);
}

function keep(i) {
  state.kept = i;
  show(i);
  drawTable();
  ring();
}

// Table.

const COLUMNS = [
  ...(data.sheets ? [{ key: "picture", title: "" }] : []),
  { key: "name", title: "example" },
  ...(data.texts ? [{ key: "text", title: "text" }] : []),
  ...(data.labels ? [{ key: "label", title: "label" }, { key: "predicted", title: "predicted" }] : []),
  ...data.columns.map((column) => ({ key: column.key, title: column.title, numeric: true, about: column.about })),
];

function valueOf(key) {
  if (byKey[key]) return (i) => byKey[key].values[i];
  return { name: (i) => data.numbers[i], text: (i) => data.texts[i], label: labelOf, predicted: predictedOf }[key];
}

function sorted(rows) {
  const value = valueOf(state.sort), sign = state.descending ? -1 : 1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return rows.slice().sort((i, j) => {
    const a = value(i), b = value(j);
    if (a === null || b === null) return (a === null) - (b === null) || i - j; // missing ones last
    return sign * compare(a, b) || i - j;
  });
}

const haystack = everyone.map((i) =>
  [data.names[i], labelOf(i), predictedOf(i), data.texts ? data.texts[i] : "", data.known && data.known[i] ? "flipped" : ""]
    .join("\n").toLowerCase());

function refresh() {
  const wanted = find("search").value.trim().toLowerCase(), own = find("class") ? find("class").value : "";
  let rows = state.selected === null ? everyone : state.selected;
  if (own !== "") rows = rows.filter((i) => data.labels[i] === Number(own));
  if (wanted) rows = rows.filter((i) => haystack[i].includes(wanted));
  state.rows = sorted(rows);
  state.page = 0;
  find("matches").textContent = `${state.rows.length.toLocaleString("en")} of ${data.count.toLocaleString("en")}`;
  find("unselect").hidden = state.selected === null;
  if (state.selected) find("unselect").textContent = `${state.selected.length} selected ×`;
  drawTable();
}

function cell(column, i) {
  if (column.key === "picture") return make("td", {}, tile(i, 40));
  if (column.numeric) return make("td", { className: "number" }, number(byKey[column.key].values[i]));
  if (column.key === "text") return make("td", { className: "text", title: data.texts[i] }, data.texts[i]);
  if (column.key === "label") {
    const out = make("td", {}, labelOf(i));
    if (data.known && data.known[i]) out.append(make("span", { className: "mark" }, "flipped"));
    return out;
  }
  if (column.key === "predicted") return make("td", { className: isWrong(i) ? "wrong" : "" }, predictedOf(i));
  return make("td", { className: "example" }, data.names[i]);
}

// Only the rows in sight are made, so that sorting ten thousand costs no more than sorting their numbers.
function drawTable() {
  const first = state.page * ROWS, rows = state.rows.slice(first, first + ROWS);
  find("table").tBodies[0].replaceChildren(...rows.map((i) => {
    const row = make("tr", { className: i === state.kept ? "kept" : "" }, ...COLUMNS.map((column) => cell(column, i)));
    row.addEventListener("click", () => keep(i));
    row.addEventListener("mouseenter", () => show(i));
    row.addEventListener("mouseleave", () => show(state.kept));
    return row;
  }));
  const last = Math.min(first + ROWS, state.rows.length);
  find("position").textContent = state.rows.length ? `${first + 1}–${last}` : "none";
  find("previous").disabled = state.page === 0;
  find("next").disabled = last >= state.rows.length;
  for (const head of find("table").tHead.rows[0].cells) {
    const own = head.dataset.key === state.sort;
    head.setAttribute("aria-sort", own ? (state.descending ? "descending" : "ascending") : "none");
  }
}

function sortBy(key) {
  const column = COLUMNS.find((one) => one.key === key);
  state.descending = state.sort === key ? !state.descending : Boolean(column.numeric);
  state.sort = key;
  refresh();
}

function save() {
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const columns = COLUMNS.filter((column) => column.key !== "picture");
  const value = (column, i) => (column.key === "name" ? data.names[i] : valueOf(column.key)(i));
  const lines = [columns.map((column) => column.key), ...state.rows.map((i) => columns.map((c) => value(c, i) ?? ""))];
  const file = new Blob([lines.map((line) => line.map((x) => quoted(String(x))).join(",")).join("\n") + "\n"]);
  const link = make("a", { href: URL.createObjectURL(file), download: "rows.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

// Plots.

// On a logarithmic axis zeros lie at its lower end.
function axis(key) {
  const values = byKey[key].values, positive = values.filter((x) => x > 0);
  if (values.some((x) => x < 0) || !positive.length) return { values, type: "linear" };
  const floor = Math.max(1e-9, positive.reduce((a, b) => Math.min(a, b)));
  return { values: values.map((x) => (x === null ? null : Math.max(x, floor))), type: "log" };
}

function decades(values) {
  return Math.log10(values.reduce((a, b) => Math.max(a, b), -Infinity) / values.reduce((a, b) => Math.min(a, b), Infinity));
}

function hasWebgl() {
  try {
    return Boolean(document.createElement("canvas").getContext("webgl"));
  } catch {
    return false;
  }
}

const KIND = data.count > 3000 && hasWebgl() ? "scattergl" : "scatter";
const plots = data.scatter.map((pair, place) => ({ pair, div: find(`scatter${place}`), axes: pair.map(axis) }));

function drawScatter({ pair, div, axes }) {
  const [x, y] = axes, colour = byKey[data.rank];
  const dots = { type: KIND, mode: "markers", x: x.values, y: y.values, hoverinfo: "none", showlegend: false,
    marker: { size: data.count > 3000 ? 4 : 6, opacity: 0.75, color: colour.values, colorscale: "Cividis",
      showscale: true, colorbar: { title: { text: colour.title, side: "right" }, thickness: 10 } },
    unselected: { marker: { opacity: 0.08 } } };
  const traces = [dots];
  if (data.known) {
    const rows = everyone.filter((i) => data.known[i]);
    traces.push({ type: KIND, mode: "markers", x: rows.map((i) => x.values[i]), y: rows.map((i) => y.values[i]),
      name: "flipped", hoverinfo: "skip", marker: { size: 9, color: "rgba(0,0,0,0)", line: { width: 1, color: COLOURS[1] } } });
  }
  traces.push({ type: KIND, mode: "markers", x: [], y: [], hoverinfo: "skip", showlegend: false,
    marker: { size: 16, color: "rgba(0,0,0,0)", line: { width: 2.5, color: INK } } });
  // Only powers of ten are ticks, where there are some.
  const scale = (key, { values, type }) => ({ title: { text: byKey[key].title }, type, exponentformat: "power",
    ...(type === "log" && decades(values) > 2 ? { dtick: 1 } : {}) });
  const layout = { margin: { l: 64, r: 8, t: 12, b: 48 }, height: 400, dragmode: "select", hovermode: "closest",
    hoverdistance: 12, showlegend: Boolean(data.known), legend: { x: 0, y: 1.08, orientation: "h" }, font: FONT,
    xaxis: scale(pair[0], x), yaxis: scale(pair[1], y) };
  return Plotly.newPlot(div, traces, layout, CONFIG).then(() => {
    div.on("plotly_hover", ({ points, event }) => points[0].curveNumber === 0 && tip(points[0].pointIndex, event));
    div.on("plotly_unhover", () => (find("tip").hidden = true));
    div.on("plotly_click", ({ points }) => points[0].curveNumber === 0 && keep(points[0].pointIndex));
    div.on("plotly_selected", (event) => {
      if (event && event.points) select(event.points.filter((p) => p.curveNumber === 0).map((p) => p.pointIndex));
    });
    div.on("plotly_deselect", () => select(null));
  });
}

function tip(i, event) {
  const box = find("tip");
  box.replaceChildren(make("div", { className: "name" }, data.names[i]), tile(i, 96), labels(i), text(i, true), figures(i));
  box.hidden = false;
  const width = box.offsetWidth, height = box.offsetHeight;
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - height - 8))}px`;
}

// The points of a selection in one plot are marked in all, and left in the table.
function select(rows) {
  state.selected = rows && rows.length ? rows : null;
  for (const { div } of plots) {
    Plotly.restyle(div, { selectedpoints: [state.selected] }, [0]);
    if (state.selected === null && div.layout.selections && div.layout.selections.length) {
      Plotly.relayout(div, { selections: [] });
    }
  }
  refresh();
}

function ring() {
  for (const { div, axes: [x, y] } of plots) {
    const at = state.kept === null ? [[], []] : [[x.values[state.kept]], [y.values[state.kept]]];
    Plotly.restyle(div, { x: [at[0]], y: [at[1]] }, [div.data.length - 1]);
  }
}

function drawClasses() {
  const key = find("histogram-score").value, { values, type } = axis(key);
  const shown = values.map((x) => (x === null ? null : type === "log" ? Math.log10(x) : x));
  const finite = shown.filter((x) => x !== null);
  const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  const counts = data.classes.map((_, c) => data.labels.filter((y) => y === c).length);
  const order = data.classes.map((_, c) => c).sort((a, b) => counts[b] - counts[a]).slice(0, 10).sort((a, b) => a - b);
  const groups = order.map((c) => [data.classes[c], (i) => data.labels[i] === c]);
  if (order.length < data.classes.length) groups.push(["other classes", (i) => !order.includes(data.labels[i])]);
  const traces = groups.map(([name, member], place) => ({ type: "histogram", name,
    x: everyone.filter(member).map((i) => shown[i]), marker: { color: COLOURS[place % COLOURS.length] },
    xbins: { start: low, end: high + 1e-9, size: (high - low) / 40 || 1 } }));
  const title = type === "log" ? `log10 of ${byKey[key].title}` : byKey[key].title;
  const layout = { barmode: "stack", margin: { l: 56, r: 8, t: 12, b: 48 }, height: 400, font: FONT,
    xaxis: { title: { text: title } }, yaxis: { title: { text: "examples" } } };
  return Plotly.react(find("class-histogram"), traces, layout, CONFIG);
}

function drawMatrix() {
  const names = data.classes.map((name) => (name.length > 16 ? name.slice(0, 15) + "…" : name));
  const trace = { type: "heatmap", x: names, y: names, z: data.class_cosines, zmin: -1, zmax: 1, colorscale: "RdBu",
    reversescale: true, hovertemplate: "%{y}, %{x}: %{z:.2f}<extra></extra>", colorbar: { thickness: 10 } };
  const layout = { margin: { l: 110, r: 8, t: 36, b: 80 }, height: 400, font: FONT,
    title: { text: "Cosines of the classes' mean gradients", font: { size: 14 } },
    xaxis: { type: "category" }, yaxis: { type: "category", autorange: "reversed" } };
  return Plotly.newPlot(find("class-cosines"), [trace], layout, CONFIG);
}

function drawLayers() {
  const { names, centres, shares } = data.layers;
  const trace = { type: "heatmap", x: centres, y: names, z: shares, colorscale: [[0, "#ffffff"], [1, COLOURS[0]]],
    hovertemplate: "%{y}<br>norm 10^%{x:.2f}: %{z:.1%}<extra></extra>",
    colorbar: { thickness: 10, tickformat: ".0%", title: { text: "share of the examples", side: "right" } } };
  const layout = { margin: { l: 40, r: 8, t: 12, b: 48 }, height: 120 + 18 * names.length, font: FONT,
    xaxis: { title: { text: "log10 of the gradient norm" } },
    yaxis: { type: "category", autorange: "reversed", automargin: true, dtick: 1, tickfont: { size: 11 } } };
  return Plotly.newPlot(find("layer-histogram"), [trace], layout, CONFIG);
}

function drawCards() {
  const value = byKey[data.rank];
  const rows = everyone.filter((i) => value.values[i] !== null).sort((i, j) => value.values[j] - value.values[i] || i - j);
  find("suspect-cards").append(...rows.slice(0, SUSPECTS).map((i) =>
    card(i, 64, make("div", { className: "hint" }, `${value.title} ${number(value.values[i])}`))));
}

function drawPairs(kind) {
  const side = (i) => {
    const out = make("div", { className: "side" }, tile(i, 44),
      make("div", {}, labels(i), data.texts ? text(i, true) : make("div", { className: "hint" }, data.names[i])));
    out.addEventListener("click", () => keep(i));
    return out;
  };
  find(kind).append(...data[kind].map(([i, j, cosine]) =>
    make("div", { className: "pair" }, side(i), side(j), make("div", {}, `cos ${number(cosine)}`))));
}

function begin() {
  const head = make("tr", {}, ...COLUMNS.map((column) => {
    const title = make("button", { title: column.about || "" }, column.title);
    if (column.key !== "picture") title.addEventListener("click", () => sortBy(column.key));
    const out = make("th", { className: column.numeric ? "number" : "" }, title);
    out.dataset.key = column.key;
    return out;
  }));
  find("table").tHead.append(head);
  find("search").addEventListener("input", refresh);
  find("save").addEventListener("click", save);
  find("unselect").addEventListener("click", () => select(null));
  find("previous").addEventListener("click", () => { state.page -= 1; drawTable(); });
  find("next").addEventListener("click", () => { state.page += 1; drawTable(); });
  if (find("class")) {
    find("class").append(...data.classes.map((name, c) => make("option", { value: String(c) }, name)));
    find("class").addEventListener("change", refresh);
  }
  show(null);
  refresh();
  if (state.rows.length) show((state.kept = state.rows[0]));
  drawTable();
  const drawing = plots.map(drawScatter);
  if (find("suspect-cards")) drawCards();
  if (find("redundant")) ["redundant", "conflicting"].forEach(drawPairs);
  if (find("histogram-score")) {
    find("histogram-score").append(...data.columns.map(({ key, title }) => make("option", { value: key }, title)));
    find("histogram-score").value = "loss" in byKey ? "loss" : data.rank;
    find("histogram-score").addEventListener("change", drawClasses);
    drawing.push(drawClasses());
  }
  if (find("class-cosines")) drawing.push(drawMatrix());
  if (data.layers) drawing.push(drawLayers());
  Promise.all(drawing).then(() => { ring(); document.body.dataset.ready = "yes"; });
}

begin();
