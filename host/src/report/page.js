// Draws the curves and the maps of a report from the data in the page. No library, no network; a page that is served
// asks its server for news.
"use strict";
(() => {
  // ---- What the reader has chosen; it outlives a redraw.
  const view = { x: "step", smooth: 0, hidden: new Set(), log: new Set(), large: new Set(), range: null, filter: "", picked: null };
  let data = read();
  let charts = [];

  function read() {
    return JSON.parse(document.getElementById("data").textContent);
  }

  function make(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function draw(tag, attributes = {}, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  }

  // Text goes in as text nodes: nothing in the data can be markup.
  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // ---- Numbers, by the rules of format.rs.
  function commas(text) {
    const [whole, rest] = text.split(".");
    const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return rest === undefined ? grouped : `${grouped}.${rest}`;
  }

  function number(value, digits = 4) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(digits - 2);
    return commas(value.toFixed(Math.min(6, Math.max(0, digits - 1 - Math.floor(Math.log10(size))))));
  }

  function written(kind, value) {
    if (kind === "percent") return `${(100 * value).toFixed(2)}\u00a0%`;
    if (kind === "count") return commas(String(Math.round(value)));
    return number(value);
  }

  function tickText(kind, value, step) {
    if (kind === "percent") return `${commas((100 * value).toFixed(places(100 * step)))}\u00a0%`;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
    return commas(value.toFixed(places(step)));
  }

  function places(step) {
    return Math.min(6, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  }

  // ---- Scales.
  function scale(low, high, from, to, log) {
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const span = high - low || 1;
    const place = (value) => from + (((log ? Math.log10(value) : value) - low) / span) * (to - from);
    const value = (at) => {
      const raw = low + ((at - from) / (to - from)) * span;
      return log ? 10 ** raw : raw;
    };
    return { place, value };
  }

  function ticks(low, high, count) {
    const rough = (high - low || 1) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return { found, step: step / power === 2.5 ? step / 5 : step };
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const factors = decades > 3 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const f of factors) {
        const value = f * 10 ** e;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    const every = Math.ceil(found.length / 6);
    return found.length ? found.filter((_, i) => i % every === 0) : [low, high];
  }

  // ---- Lines: what is to be seen of a chart.
  function linesOf(chart) {
    const lines = [];
    data.charts.runs.forEach((run, place) => {
      if (view.hidden.has(place)) return;
      chart.lines.forEach((part, second) => {
        const line = run.lines[part.metric];
        if (!line) return;
        const points = [];
        line.at.forEach((at, i) => {
          const x = run[view.x][at];
          if (x !== null) points.push({ x, y: line.value[i], at });
        });
        if (points.length) lines.push({ run, place, second, part, points, of: line.of });
      });
    });
    return lines;
  }

  // The exponential mean that TensorBoard shows, corrected for its start at zero.
  function smoothed(points, weight) {
    let sum = 0;
    return points.map((point, i) => {
      sum = weight * sum + (1 - weight) * point.y;
      return { ...point, y: sum / (1 - weight ** (i + 1)) };
    });
  }

  function nearest(points, x) {
    let [low, high] = [0, points.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle].x < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - points[low - 1].x <= points[low].x - x ? points[low - 1] : points[low];
  }

  function offset(inner, outer) {
    return inner.getBoundingClientRect().top - outer.getBoundingClientRect().top;
  }

  function xText(x) {
    return view.x === "step" ? commas(String(x)) : number(x, 3);
  }

  const UNIT = { step: "step", epoch: "epoch", hours: "h" };

  // ---- One chart.
  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.key = spec.lines.map((line) => line.metric).join(" ");
      this.tip = make("div", { class: "tip", role: "status", hidden: "" });
      this.svg = draw("svg", { role: "img", tabindex: "0" });
      this.logButton = this.flag("log", view.log, `Logarithmic scale for ${spec.name}`);
      this.largeButton = this.flag("larger", view.large, `Larger chart of ${spec.name}`);
      this.legend = make("div", { class: "legend" });
      if (spec.lines.length > 1)
        spec.lines.forEach((line, i) => {
          this.legend.append(make("span", { class: i ? "swatch second" : "swatch" }), `${line.label}\u2003`);
        });
      const metrics = spec.lines.map((line) => line.metric).join(", ");
      this.figure = make(
        "figure",
        { class: "chart" },
        make("figcaption", {}, make("h4", { title: metrics }, spec.name), this.logButton, this.largeButton),
        spec.lines.length > 1 ? this.legend : null,
        this.svg,
        this.tip,
      );
      this.listen();
    }

    flag(word, set, label) {
      const button = make("button", { type: "button", "aria-label": label, "aria-pressed": set.has(this.key) }, word);
      button.addEventListener("click", () => {
        if (!set.delete(this.key)) set.add(this.key);
        button.setAttribute("aria-pressed", set.has(this.key));
        this.redraw();
      });
      return button;
    }

    listen() {
      const at = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      this.svg.addEventListener("pointermove", (event) => {
        if (!this.x) return;
        if (this.pressed !== undefined && event.pointerType === "mouse") this.brush(at(event));
        show(this.x.value(at(event)), this);
      });
      this.svg.addEventListener("pointerleave", () => show(null));
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "mouse" && event.button === 0) this.pressed = at(event);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const start = this.pressed;
        this.pressed = undefined;
        if (start === undefined || Math.abs(at(event) - start) < 6) return this.band?.remove();
        const ends = [start, at(event)].map((p) => this.x.value(p));
        view.range = [Math.min(...ends), Math.max(...ends)];
        redraw();
      });
      this.svg.addEventListener("dblclick", () => {
        view.range = null;
        redraw();
      });
      this.svg.addEventListener("blur", () => show(null));
      this.svg.addEventListener("keydown", (event) => this.keyed(event));
    }

    // The arrow keys go from value to value.
    keyed(event) {
      const all = this.lines?.flatMap((line) => line.points.map((point) => point.x)) ?? [];
      const xs = [...new Set(all)].sort((a, b) => a - b);
      if (!xs.length) return;
      const now = this.cursor === null || this.cursor === undefined ? -1 : xs.findIndex((x) => x >= this.cursor - 1e-9);
      const last = xs.length - 1;
      const next = {
        ArrowRight: Math.min(last, now + 1),
        ArrowLeft: now < 0 ? last : Math.max(0, now - 1),
        Home: 0,
        End: last,
      }[event.key];
      if (event.key === "Escape") show(null);
      if (next === undefined) return;
      event.preventDefault();
      show(xs[next], this);
    }

    brush(to) {
      this.band?.remove();
      const [a, b] = [Math.min(this.pressed, to), Math.max(this.pressed, to)];
      this.band = draw("rect", { class: "brush", x: a, width: b - a, y: this.top, height: this.bottom - this.top });
      this.svg.append(this.band);
    }

    redraw() {
      const { spec, svg } = this;
      const large = view.large.has(this.key);
      this.figure.classList.toggle("large", large);
      const matches = spec.name.toLowerCase().includes(view.filter) || this.key.toLowerCase().includes(view.filter);
      let lines = linesOf(spec);
      this.figure.hidden = !matches || !lines.length;
      svg.replaceChildren();
      this.marks = null;
      this.lines = null;
      if (this.figure.hidden) return;

      if (view.range) {
        const inside = (point) => point.x >= view.range[0] && point.x <= view.range[1];
        lines = lines.map((line) => ({ ...line, points: line.points.filter(inside) })).filter((line) => line.points.length);
      }
      // A logarithm needs values above zero.
      let log = view.log.has(this.key);
      if (log) {
        const positive = lines.map((line) => ({ ...line, points: line.points.filter((p) => p.y > 0) })).filter((l) => l.points.length);
        if (positive.length) lines = positive;
        else log = false;
      }
      const width = Math.max(200, this.figure.clientWidth);
      const height = large ? Math.min(520, Math.max(300, width * 0.42)) : 178;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("width", width);
      svg.setAttribute("height", height);
      if (!lines.length) {
        svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing in this range"));
        return;
      }
      const weight = lines.some((line) => line.points.length > 12) ? view.smooth : 0;
      for (const line of lines) line.shown = weight && line.points.length > 12 ? smoothed(line.points, weight) : line.points;

      const xs = lines.flatMap((line) => [line.points[0].x, line.points[line.points.length - 1].x]);
      let [left, right] = view.range ?? [Math.min(...xs), Math.max(...xs)];
      if (left === right) [left, right] = [left - 1, right + 1];
      let [low, high] = [Infinity, -Infinity];
      for (const line of lines)
        for (const point of line.points) {
          low = Math.min(low, point.y);
          high = Math.max(high, point.y);
        }
      if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      else if (log) [low, high] = [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
      else [low, high] = [low >= 0 && low < 0.15 * high ? 0 : low - 0.05 * (high - low), high + 0.05 * (high - low)];

      const linear = ticks(low, high, large ? 7 : 5);
      const yTicks = log ? logTicks(low, high) : linear.found;
      const yText = yTicks.map((value) => tickText(spec.kind, value, log ? value * 0.1 : linear.step));
      const margin = { left: 9 + 6.3 * Math.max(...yText.map((text) => text.length)), right: data.charts.runs.length > 1 ? 18 : 8 };
      this.top = 8;
      this.bottom = height - 21;
      this.x = scale(left, right, margin.left, width - margin.right, false);
      this.y = scale(low, high, this.bottom, this.top, log);

      yTicks.forEach((value, i) => {
        const y = Math.round(this.y.place(value)) + 0.5;
        svg.append(draw("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y, y2: y }));
        svg.append(draw("text", { x: margin.left - 6, y: y + 3.5, "text-anchor": "end" }, yText[i]));
      });
      const wide = width - margin.left - margin.right;
      const xTicks = ticks(left, right, Math.max(2, Math.floor(wide / 62)));
      for (const value of xTicks.found) {
        const x = this.x.place(value);
        const edge = x > width - margin.right - 14 ? "end" : "middle";
        const text = tickText("number", value, xTicks.step);
        svg.append(draw("line", { class: "axis", x1: x, x2: x, y1: this.bottom, y2: this.bottom + 4 }));
        svg.append(draw("text", { x, y: height - 5, "text-anchor": edge }, text));
      }
      svg.append(draw("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: this.bottom + 0.5, y2: this.bottom + 0.5 }));
      svg.append(draw("text", { x: margin.left - 6, y: height - 5, "text-anchor": "end" }, UNIT[view.x]));

      const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${this.x.place(p.x).toFixed(1)},${this.y.place(p.y).toFixed(1)}`).join("");
      for (const line of lines) {
        const style = `r${line.place % 8}`;
        const second = line.second ? " second" : "";
        if (line.shown !== line.points) svg.append(draw("path", { class: `line raw ${style}`, d: path(line.points) }));
        svg.append(draw("path", { class: `line ${style}${second}`, d: path(line.shown) }));
        if (line.points.length <= 24)
          for (const p of line.shown) svg.append(draw("circle", { class: `dot ${style}`, cx: this.x.place(p.x), cy: this.y.place(p.y), r: 2.6 }));
      }
      if (data.charts.runs.length > 1) this.letters(lines);
      this.lines = lines;
      this.marks = draw("g", {});
      svg.append(this.marks);
      svg.setAttribute("aria-label", this.describe(lines));
    }

    // Each run's letter at the end of its line, one beside the other where they would overlap.
    letters(lines) {
      const ends = lines
        .filter((line) => !line.second || !lines.some((other) => other.place === line.place && !other.second))
        .map((line) => ({ line, last: line.shown[line.shown.length - 1] }))
        .map(({ line, last }) => ({ line, x: this.x.place(last.x) + 5, y: this.y.place(last.y) }))
        .sort((a, b) => a.y - b.y);
      ends.forEach((end, i) => {
        const above = ends.slice(0, i).filter((other) => Math.abs(other.x - end.x) < 14);
        if (above.length) end.y = Math.max(end.y, above[above.length - 1].y + 11);
      });
      const over = ends.length ? ends[ends.length - 1].y - this.bottom : 0;
      for (const end of ends) {
        const y = end.y - Math.max(0, over) + 4;
        this.svg.append(draw("text", { class: `end r${end.line.place % 8}`, x: end.x, y }, end.line.run.letter));
      }
    }

    describe(lines) {
      const one = (line) => {
        const { kind } = this.spec;
        const ys = line.points.map((point) => point.y);
        const first = line.points[0];
        const last = line.points[line.points.length - 1];
        const range = `least ${written(kind, Math.min(...ys))}, greatest ${written(kind, Math.max(...ys))}`;
        const at = (point) => `${written(kind, point.y)} at ${UNIT[view.x]} ${xText(point.x)}`;
        return `${line.run.name}${line.part.label ? `, ${line.part.label}` : ""}: from ${at(first)} to ${at(last)}, ${range}.`;
      };
      return `${this.spec.name} by ${view.x}. ${lines.map(one).join(" ")} Arrow keys go from value to value.`;
    }

    // Marks the values at x; says them where the reader is.
    mark(x, here) {
      this.cursor = x;
      if (!this.marks) return;
      this.marks.replaceChildren();
      this.tip.hidden = true;
      if (x === null) return;
      const found = this.lines.map((line) => ({ line, point: nearest(line.points, x) }));
      const closest = found.reduce((a, b) => (Math.abs(b.point.x - x) < Math.abs(a.point.x - x) ? b : a));
      const snapped = closest.point.x;
      const at = this.x.place(snapped);
      this.marks.append(draw("line", { class: "rule", x1: at, x2: at, y1: this.top, y2: this.bottom }));
      for (const { line, point } of found) {
        const shown = line.shown === line.points ? point : nearest(line.shown, point.x);
        this.marks.append(draw("circle", { class: `dot r${line.place % 8}`, cx: this.x.place(point.x), cy: this.y.place(shown.y), r: 3.6 }));
      }
      if (!here) return;
      const { run } = closest.line;
      const { at: record } = closest.point;
      const hours = run.hours[record];
      const epoch = number(run.epoch[record], 3);
      const place = `step ${commas(String(run.step[record]))} · epoch ${epoch}${hours === null ? "" : hours < 1 ? ` · ${(60 * hours).toFixed(1)} min` : ` · ${number(hours, 3)} h`}`;
      const several = data.charts.runs.length > 1;
      const rows = found.map(({ line, point }) => {
        const label = [line.part.label, point.x === snapped ? "" : `${UNIT[view.x]} ${xText(point.x)}`].filter(Boolean).join(", ");
        const smooth = line.shown === line.points ? "" : ` (≈\u00a0${written(this.spec.kind, nearest(line.shown, point.x).y)})`;
        return make(
          "tr",
          {},
          several ? make("td", {}, make("span", { class: `key r${line.place % 8}` }, line.run.letter)) : null,
          make("td", {}, label),
          make("td", {}, written(this.spec.kind, point.y) + smooth),
        );
      });
      this.tip.replaceChildren(make("div", { class: "at" }, place), make("table", { role: "presentation" }, make("tbody", {}, ...rows)));
      this.tip.hidden = false;
      const room = this.figure.clientWidth - this.tip.offsetWidth;
      const beside = at + 14 > room ? at - 14 - this.tip.offsetWidth : at + 14;
      this.tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
      // Where it would hide the chart, it stands below.
      const below = this.tip.offsetWidth > 0.55 * this.figure.clientWidth;
      this.tip.style.top = `${offset(this.svg, this.figure) + (below ? this.bottom + 24 : this.top + 4)}px`;
    }
  }

  function show(x, here = null) {
    for (const chart of charts) chart.mark(x, chart === here);
  }

  function redraw() {
    for (const chart of charts) chart.redraw();
    for (const group of document.querySelectorAll("#curves .group"))
      group.hidden = ![...group.querySelectorAll(".chart")].some((chart) => !chart.hidden);
    const whole = document.getElementById("whole");
    if (whole) whole.hidden = !view.range;
  }

  // ---- The bar above the charts.
  function bar() {
    const { runs } = data.charts;
    const toggle = (run, place) => {
      const button = make(
        "button",
        { type: "button", class: "run", "aria-pressed": !view.hidden.has(place) },
        make("span", { class: `key r${place % 8}` }, run.letter),
        ` ${run.name}`,
      );
      button.addEventListener("click", () => {
        if (!view.hidden.delete(place)) view.hidden.add(place);
        button.setAttribute("aria-pressed", !view.hidden.has(place));
        redraw();
      });
      return button;
    };
    const axes = [["step", "step"], ["epoch", "epoch"]];
    if (runs.some((run) => run.hours.some((hours) => hours !== null))) axes.push(["hours", "time"]);
    const axis = make("select", { id: "axis" }, ...axes.map(([value, name]) => make("option", { value, selected: value === view.x ? "" : null }, name)));
    axis.addEventListener("change", () => {
      view.x = axis.value;
      view.range = null;
      redraw();
    });
    const smooth = make("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: view.smooth });
    const amount = make("output", { for: "smooth" }, view.smooth.toFixed(2));
    smooth.addEventListener("input", () => {
      view.smooth = Number(smooth.value);
      amount.textContent = view.smooth.toFixed(2);
      redraw();
    });
    const filter = make("input", { type: "search", placeholder: "loss, knn, lr …", value: view.filter });
    filter.addEventListener("input", () => {
      view.filter = filter.value.trim().toLowerCase();
      redraw();
    });
    const whole = make("button", { type: "button", id: "whole", hidden: "" }, "Whole range");
    whole.addEventListener("click", () => {
      view.range = null;
      redraw();
    });
    return make(
      "div",
      { class: "bar" },
      runs.length > 1 ? make("fieldset", { "aria-label": "Runs" }, ...runs.map(toggle)) : null,
      make("label", {}, "Metric", filter),
      make("label", {}, "By", axis),
      make("label", {}, "Smoothing", smooth, amount),
      whole,
    );
  }

  function curves() {
    charts = [];
    const section = document.getElementById("curves");
    if (!data.charts.groups.length) return;
    section.append(bar());
    for (const group of data.charts.groups) {
      const drawn = group.charts.map((spec) => new Chart(spec));
      charts.push(...drawn);
      section.append(
        make("div", { class: "group" }, make("h3", {}, group.name), make("div", { class: "charts" }, ...drawn.map((chart) => chart.figure))),
      );
    }
    section.append(make("p", { class: "note" }, "Drag over a stretch to see it alone, double-click to see all. Curves with very many values show the least and the greatest of each stretch."));
    redraw();
  }

  // ---- Maps of features, and neighbours.
  function tile(map, place, attributes) {
    const element = make("div", { role: "img", ...attributes, class: `tile ${attributes.class ?? ""}` });
    element.style.setProperty("--column", place % 32);
    element.style.setProperty("--row", Math.floor(place / 32));
    element.style.backgroundImage = `url("${data.sheets[map.sheet]}")`;
    return element;
  }

  function className(map, label) {
    return label < 0 ? "no label" : (map.classes[label] ?? String(label));
  }

  function color(label) {
    return `c${(((label % 10) + 10) % 10)}`;
  }

  function mapFigure(map, run, place) {
    const side = 400;
    const ends = (axis) => map.points.reduce(([a, b], p) => [Math.min(a, p[axis]), Math.max(b, p[axis])], [Infinity, -Infinity]);
    const [[x0, x1], [y0, y1]] = [ends(0), ends(1)];
    const height = Math.round(Math.max(200, Math.min(side, (side * (y1 - y0)) / (x1 - x0 || 1))));
    const x = scale(x0, x1, 10, side - 10, false);
    const y = scale(y0, y1, height - 10, 10, false);
    const classes = [...new Set(map.labels)].sort((a, b) => a - b);
    const shares = map.shares.map((share) => written("percent", share));
    const label = `${run.name}: ${map.points.length} held-out images by the first two principal components of their features, which have ${shares[0]} and ${shares[1]} of the variance, in ${classes.length} classes.`;
    const svg = draw("svg", { role: "img", viewBox: `0 0 ${side} ${height}`, "aria-label": label });
    const faded = (l) => (view.picked !== null && view.picked !== l ? " faded" : "");
    map.points.forEach((p, i) => {
      const l = map.labels[i];
      svg.append(draw("circle", { class: color(l) + faded(l), cx: x.place(p[0]).toFixed(1), cy: y.place(p[1]).toFixed(1), r: 2.6 }));
    });
    if (classes.length <= 20) {
      // A class's name stands at its median, or below the names that are there already.
      const names = classes.map((l) => {
        const own = map.points.filter((_, i) => map.labels[i] === l);
        const middle = (axis) => own.map((p) => p[axis]).sort((a, b) => a - b)[own.length >> 1];
        return { l, text: className(map, l), x: x.place(middle(0)), y: y.place(middle(1)) };
      });
      names.sort((a, b) => a.y - b.y);
      names.forEach((name, i) => {
        const meets = (other) => Math.abs(other.x - name.x) < 3.4 * (other.text.length + name.text.length) && Math.abs(other.y - name.y) < 13;
        for (let other; (other = names.slice(0, i).find(meets)); ) name.y = other.y + 13.01;
        svg.append(draw("text", { class: `class${faded(name.l)}`, x: name.x, y: name.y }, name.text));
      });
    }
    const tip = make("div", { class: "tip", hidden: "" });
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const zoom = side / box.width;
      const [px, py] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
      let [best, distance] = [-1, 14 * zoom];
      map.points.forEach((p, i) => {
        const d = Math.hypot(x.place(p[0]) - px, y.place(p[1]) - py);
        if (d < distance) [best, distance] = [i, d];
      });
      tip.hidden = best < 0;
      if (best < 0) return;
      const name = className(map, map.labels[best]);
      tip.replaceChildren(tile(map, best, { "aria-label": name }), make("div", {}, name));
      const [left, top] = [x.place(map.points[best][0]) / zoom, y.place(map.points[best][1]) / zoom];
      tip.style.left = `${left + 12 + tip.offsetWidth > box.width ? left - 12 - tip.offsetWidth : left + 12}px`;
      tip.style.top = `${offset(svg, svg.parentElement) + top - 10}px`;
    });
    svg.addEventListener("pointerleave", () => (tip.hidden = true));
    const title = data.charts.runs.length > 1 ? [make("span", { class: `key r${place % 8}` }, run.letter), ` ${run.name}, `] : [];
    const caption = make("figcaption", {}, ...title, `step ${commas(String(map.step))}: components 1 (across, ${shares[0]}) and 2 (up, ${shares[1]} of the variance)`);
    return make("figure", { class: "map" }, svg, tip, caption);
  }

  function neighbourRows(map, run, place) {
    const several = data.charts.runs.length > 1;
    const title = several ? make("h4", {}, make("span", { class: `key r${place % 8}` }, run.letter), ` ${run.name}`) : null;
    const rows = map.neighbours.map(([query, found]) => {
      const name = className(map, map.labels[query]);
      const others = found.map((other) => {
        const same = map.labels[other] === map.labels[query];
        const text = className(map, map.labels[other]);
        return tile(map, other, { class: same ? "same" : "other", "aria-label": `${text}, ${same ? "the same class" : "another class"}`, title: text });
      });
      return make("div", { class: "row" }, tile(map, query, { "aria-label": `${name}; nearest to it:`, title: name }), ...others);
    });
    const all = map.neighbours.flatMap(([query, found]) => found.map((other) => map.labels[other] === map.labels[query]));
    const share = `${all.filter(Boolean).length} of ${all.length} neighbours are of the same class.`;
    return make("div", {}, title, ...rows, make("p", { class: "note" }, share));
  }

  function features() {
    const section = document.getElementById("features");
    section.querySelectorAll(".drawn").forEach((old) => old.remove());
    const present = data.maps.map((map, place) => ({ map, place, run: data.charts.runs[place] })).filter(({ map }) => map);
    if (!present.length) return;
    const { map } = present[0];
    const classes = [...new Set(present.flatMap((one) => one.map.labels))].sort((a, b) => a - b);
    const box = make("div", { class: present.length > 1 ? "drawn" : "drawn single" });
    const [where, who] = [make("div"), make("div")];
    where.append(make("p", { class: "note" }, `${commas(String(map.points.length))} held-out images by the two principal components of their features, each of length 1. What lies apart here lies apart; what lies together may still differ in other components.`));
    if (classes.length > 1 && classes.length <= 100) {
      const pick = (l) => {
        const button = make("button", { type: "button", "aria-pressed": view.picked === l }, make("i", { class: color(l) }), className(map, l));
        button.addEventListener("click", () => {
          view.picked = view.picked === l ? null : l;
          features();
          section.querySelector(`.classes button:nth-child(${classes.indexOf(l) + 1})`)?.focus();
        });
        return button;
      };
      where.append(make("div", { class: "classes", role: "group", "aria-label": "Show one class alone" }, ...classes.map(pick)));
    }
    where.append(make("div", { class: "maps" }, ...present.map((one) => mapFigure(one.map, one.run, one.place))));
    who.append(
      make("h3", {}, "Nearest neighbours"),
      make("p", { class: "note" }, "An image of each class, and by it those nearest to it by cosine among all of the map: a line under those of its class, dots under others."),
      make("div", { class: "neighbours" }, ...present.map((one) => neighbourRows(one.map, one.run, one.place))),
    );
    box.append(where, who);
    section.append(box);
  }

  // ---- News, where the page is served.
  async function watch() {
    let stamp = null;
    for (;;) {
      try {
        const now = await (await fetch("stamp")).text();
        if (stamp !== null && now !== stamp) {
          const page = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
          const open = [...document.querySelectorAll("details")].map((details) => details.open);
          document.getElementById("content").replaceWith(page.getElementById("content"));
          document.getElementById("data").textContent = page.getElementById("data").textContent;
          document.querySelectorAll("details").forEach((details, i) => (details.open = open[i] ?? false));
          data = read();
          curves();
          features();
        }
        stamp = now;
      } catch {
        // The server is gone, or not there yet: the page stays as it is.
      }
      await new Promise((wake) => setTimeout(wake, 3000));
    }
  }

  curves();
  features();
  let width = document.body.clientWidth;
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== width) redraw();
    width = document.body.clientWidth;
  });
  window.addEventListener("beforeprint", redraw);
  if (document.body.hasAttribute("data-live")) watch();
})();
