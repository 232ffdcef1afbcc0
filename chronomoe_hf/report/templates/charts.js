"use strict";
(() => {
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const DIVERGING = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"];
  const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2]];
  let INK, SOFT, GRID, EMPTY, PAPER, GROUND; // as the page has them, light or dark
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    [INK, SOFT, GRID, EMPTY, PAPER, GROUND] = ["ink", "soft", "line", "field", "paper", "ground"].map((name) => style.getPropertyValue(`--${name}`).trim());
  };
  colours();
  const TOP = 5; // room for the half line by which the first row's label may stand out
  const FONT = '12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
  const specs = JSON.parse(document.getElementById("chronomoe-figures").textContent);

  const make = (tag, parent, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const ramp = (stops) => (part) => {
    const place = Math.min(1, Math.max(0, part)) * (stops.length - 1), left = Math.min(stops.length - 2, Math.floor(place));
    const from = rgb(stops[left]), to = rgb(stops[left + 1]);
    return `rgb(${from.map((v, i) => Math.round(v + (to[i] - v) * (place - left))).join(",")})`;
  };
  const RAMPS = { sequential: ramp(CIVIDIS), diverging: ramp(DIVERGING) };
  const canvasOf = (canvas, width, height) => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = FONT;
    return pen;
  };
  const short = (value) => {
    if (value === null || value === undefined) return "no data";
    const size = Math.abs(value);
    return size >= 10000 ? value.toExponential(1) : size >= 100 ? value.toFixed(0) : String(Number(value.toFixed(size >= 1 ? 2 : 3)));
  };
  const ticks = (low, high, most) => {
    const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) || power * 10;
    const out = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) out.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    return out;
  };
  const tipOf = (plot) => {
    const tip = make("div", plot, "tip");
    tip.hidden = true;
    return {
      show(event, text) {
        const box = plot.getBoundingClientRect();
        tip.textContent = text;
        tip.hidden = false;
        const x = event.clientX - box.left, y = event.clientY - box.top;
        tip.style.left = `${Math.max(0, Math.min(x + 12, box.width - tip.offsetWidth))}px`;
        tip.style.top = `${y + 16}px`;
      },
      hide() { tip.hidden = true; },
    };
  };

  // ---- cells: layer by step, or layer by expert with a slider over the windows ------------------------------------
  const grid = (plot, spec) => {
    const bytes = Uint8Array.from(atob(spec.cells), (c) => c.charCodeAt(0));
    const rows = spec.rows.length, columns = spec.columns.length, size = rows * columns;
    const frames = Math.max(1, spec.frames.length), colour = RAMPS[spec.scale];
    let frame = frames - 1;
    const value = (code) => spec.low + ((code - 2) / 253) * (spec.high - spec.low);
    const words = (code) => {
      if (code === 0) return "no data";
      if (code === 1) return "no token";
      if (spec.scale === "diverging") {
        const fair = 2 ** value(code);
        return `${code === 2 ? "at most " : code === 255 ? "at least " : ""}${fair.toFixed(2)} ${spec.unit}`;
      }
      return `${spec.unit} ${value(code).toFixed(2)}`;
    };
    if (spec.frames.length > 1) {
      const bar = make("div", plot, "controls");
      const label = make("label", bar, "", "shown ");
      const slider = make("input", bar);
      slider.type = "range";
      slider.min = 0;
      slider.max = frames - 1;
      slider.value = frame;
      slider.id = `slider-${plot.dataset.figure}`;
      label.htmlFor = slider.id;
      const output = make("output", bar);
      output.htmlFor = slider.id;
      const follow = () => {
        frame = Number(slider.value);
        output.textContent = spec.frames[frame];
        draw();
      };
      slider.addEventListener("input", follow);
      plot.follow = follow;
    }
    const canvas = make("canvas", plot);
    const legend = make("div", plot, "legend");
    const tip = tipOf(plot);
    let place = null;
    const draw = () => {
      const width = plot.clientWidth;
      const probe = canvas.getContext("2d");
      probe.font = FONT;
      const left = Math.ceil(Math.max(...spec.rows.map((r) => probe.measureText(r).width), 20)) + 26, bottom = 34, right = 4;
      const cell = (width - left - right) / columns, line = Math.max(5, Math.min(26, 420 / rows));
      const height = rows * line + bottom + 2;
      const pen = canvasOf(canvas, width, height + TOP);
      pen.translate(0, TOP);
      let dead = 0, sum = 0;
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          const code = bytes[frame * size + r * columns + c];
          const x = left + c * cell, y = r * line;
          sum = (sum * 31 + code) % 1000003;
          pen.fillStyle = code === 0 ? EMPTY : code === 1 ? PAPER : colour((code - 2) / 253);
          pen.fillRect(x, y, cell + (cell > 4 ? -0.6 : 0.3), line - (line > 8 ? 0.6 : 0));
          if (code !== 1) continue;
          dead++;
          const cross = Math.min(cell, line) / 2 - 1.5;
          if (cross < 2) {
            pen.fillStyle = INK;
            pen.fillRect(x, y, Math.max(1, cell), line);
          } else {
            const mx = x + cell / 2, my = y + line / 2, arm = Math.min(cross, 6);
            pen.strokeStyle = INK;
            pen.lineWidth = 1.6;
            pen.beginPath();
            pen.moveTo(mx - arm, my - arm); pen.lineTo(mx + arm, my + arm);
            pen.moveTo(mx + arm, my - arm); pen.lineTo(mx - arm, my + arm);
            pen.stroke();
          }
        }
      }
      pen.fillStyle = SOFT;
      pen.textBaseline = "middle";
      pen.textAlign = "right";
      const every = Math.ceil(14 / line);
      for (let r = 0; r < rows; r += every) pen.fillText(spec.rows[r], left - 6, r * line + line / 2);
      pen.textAlign = "center";
      const widest = Math.max(...spec.columns.map((c) => pen.measureText(c).width)) + 12;
      const skip = Math.max(1, Math.ceil(widest / cell));
      for (let c = 0; c < columns; c += skip) pen.fillText(spec.columns[c], Math.min(left + c * cell + cell / 2, width - widest / 2 + 6), rows * line + 10);
      pen.fillText(spec.column_name, left + (width - left) / 2, rows * line + 26);
      pen.save();
      pen.translate(9, (rows * line) / 2);
      pen.rotate(-Math.PI / 2);
      pen.fillText(spec.row_name, 0, 0);
      pen.restore();
      place = { left, cell, line };
      plot.dataset.dead = dead;
      plot.dataset.sum = sum;
      plot.dataset.step = spec.frames[frame] || "";
      plot.dataset.drawn = "yes";
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const c = Math.floor((event.clientX - box.left - place.left) / place.cell), r = Math.floor((event.clientY - box.top - TOP) / place.line);
      if (c < 0 || r < 0 || c >= columns || r >= rows) return tip.hide();
      tip.show(event, `${spec.row_name} ${spec.rows[r]}, ${spec.column_name} ${spec.columns[c]}: ${words(bytes[frame * size + r * columns + c])}`);
    });
    canvas.addEventListener("pointerleave", () => tip.hide());
    const bar = make("span", legend);
    const scale = make("canvas", bar);
    scale.style.width = "120px";
    const pen = canvasOf(scale, 120, 10);
    for (let x = 0; x < 120; x++) { pen.fillStyle = colour(x / 119); pen.fillRect(x, 0, 1, 10); }
    const ends = spec.scale === "diverging" ? ["1/8 of the fair share", "8 times"] : [`${spec.unit} ${spec.low}`, `${spec.high}`];
    bar.prepend(`${ends[0]} `);
    bar.append(ends[1]);
    if (spec.threshold && spec.threshold.at > spec.low && spec.threshold.at < spec.high) {
      pen.fillStyle = "#ffffff";
      pen.fillRect(120 * (spec.threshold.at - spec.low) / (spec.high - spec.low) - 1.5, 0, 3, 10);
      pen.fillStyle = "#d55e00";
      pen.fillRect(120 * (spec.threshold.at - spec.low) / (spec.high - spec.low) - 0.5, 0, 1.4, 10);
      make("span", legend, "", `mark: ${spec.threshold.text}`);
    } else if (spec.threshold) make("span", legend, "", `outside this scale: ${spec.threshold.text}`);
    if (bytes.includes(1)) make("span", legend, "", "✕ or solid: no token");
    if (bytes.includes(0)) make("span", legend, "", "grey: no data");
    return plot.follow || draw;
  };

  // ---- lines: small multiples ---------------------------------------------------------------------------------------
  const axes = (pen, width, height, x, low, high, marks, name, texts) => {
    const labels = ticks(low, high, 4), left = Math.ceil(Math.max(...labels.map((t) => pen.measureText(short(t)).width))) + 10;
    const box = { left, right: width - 12, top: 8, bottom: height - 36 };
    const first = x[0], last = x.length > 1 ? x[x.length - 1] : x[0] + 1;
    const sx = (v) => box.left + ((v - first) / (last - first || 1)) * (box.right - box.left);
    const sy = (v) => box.bottom - ((v - low) / (high - low || 1)) * (box.bottom - box.top);
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of labels) {
      pen.strokeStyle = GRID;
      pen.beginPath(); pen.moveTo(box.left, sy(tick)); pen.lineTo(box.right, sy(tick)); pen.stroke();
      pen.fillStyle = SOFT;
      pen.fillText(short(tick), box.left - 6, sy(tick));
    }
    pen.textAlign = "center";
    if (texts) {
      const widest = Math.max(...texts.map((t) => pen.measureText(t).width)) + 10;
      const skip = Math.max(1, Math.ceil(widest * (last - first || 1) / (box.right - box.left)));
      for (let at = Math.ceil(first); at <= last && at < texts.length; at++) {
        const half = pen.measureText(texts[at]).width / 2;
        if (at % skip === 0) pen.fillText(texts[at], Math.min(sx(at), width - half - 2), height - 24);
      }
    } else {
      const whole = ticks(first, last, Math.max(2, width / 110)).filter(Number.isInteger);
      for (const tick of whole.length > 1 ? whole : [first, last]) pen.fillText(String(tick), Math.min(sx(tick), box.right - 8), height - 24);
    }
    pen.fillText(name, (box.left + box.right) / 2, height - 8);
    pen.setLineDash([3, 3]);
    pen.strokeStyle = SOFT;
    for (const [at] of marks || []) { pen.beginPath(); pen.moveTo(sx(at), box.top); pen.lineTo(sx(at), box.bottom); pen.stroke(); }
    pen.setLineDash([]);
    return { box, sx, sy };
  };
  const stroke = (pen, x, y, sx, sy, colour, dash) => {
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = 1.8;
    pen.setLineDash(dash);
    pen.lineJoin = "round";
    let open = false;
    pen.beginPath();
    y.forEach((v, i) => {
      if (v === null) { open = false; return; }
      if (open) pen.lineTo(sx(x[i]), sy(v)); else pen.moveTo(sx(x[i]), sy(v));
      open = true;
    });
    pen.stroke();
    pen.setLineDash([]);
    y.forEach((v, i) => {
      const alone = v !== null && (i === 0 || y[i - 1] === null) && (i === y.length - 1 || y[i + 1] === null);
      if (alone) { pen.beginPath(); pen.arc(sx(x[i]), sy(v), 2.4, 0, 7); pen.fill(); }
    });
  };
  const gaps = (series, own) => own ? series.map((s) => ({ ...s, pairs: s.y.map((v, i) => [i, v]).filter((p) => p[1] !== null) })) : series;
  const lines = (plot, spec) => {
    const holder = make("div", plot, spec.panels.length === 1 ? "panels one" : "panels");
    const tip = tipOf(plot);
    const drawers = spec.panels.map((panel) => {
      const part = make("div", holder);
      make("h3", part, "", panel.title);
      const canvas = make("canvas", part);
      const x = panel.x || spec.x, series = gaps(panel.series, Boolean(panel.x));
      let scale = null;
      const pad = (panel.high - panel.low) * 0.05;
      let range = null, from = null;
      const draw = () => {
        const width = part.clientWidth, height = 164;
        const pen = canvasOf(canvas, width, height);
        const within = range || [x[0], x.length > 1 ? x[x.length - 1] : x[0] + 1];
        scale = axes(pen, width, height, within, panel.low, panel.high + pad, (panel.x_texts ? [] : spec.marks || []).filter((m) => m[0] >= within[0] && m[0] <= within[1]), panel.x_name || spec.x_name || "step", panel.x_texts);
        if (panel.threshold !== undefined && panel.threshold <= panel.high + pad) {
          pen.strokeStyle = "#d55e00";
          pen.setLineDash([6, 4]);
          pen.beginPath(); pen.moveTo(scale.box.left, scale.sy(panel.threshold)); pen.lineTo(scale.box.right, scale.sy(panel.threshold)); pen.stroke();
          pen.setLineDash([]);
        }
        pen.save();
        pen.beginPath(); pen.rect(scale.box.left - 3, 0, scale.box.right - scale.box.left + 6, height - 34); pen.clip();
        canvas.dataset.range = within.join(" ");
        series.forEach((s, i) => {
          const at = s.pairs ? s.pairs.map((p) => x[p[0]]) : x, y = s.pairs ? s.pairs.map((p) => p[1]) : s.y;
          stroke(pen, at, y, scale.sx, scale.sy, LINES[i % 6], DASHES[i % 6]);
        });
        pen.restore();
      };
      const stepAt = (event) => {
        const within = range || [x[0], x[x.length - 1]], part = (event.clientX - canvas.getBoundingClientRect().left - scale.box.left) / (scale.box.right - scale.box.left);
        return within[0] + Math.min(1, Math.max(0, part)) * (within[1] - within[0]);
      };
      canvas.style.touchAction = "pan-y";
      canvas.title = "drag across a part to see it larger, double click for all of it";
      canvas.addEventListener("pointerdown", (event) => { from = stepAt(event); });
      canvas.addEventListener("pointerup", (event) => {
        const to = stepAt(event), ends = [from, to].sort((a, b) => a - b);
        if (from !== null && x.filter((v) => v >= ends[0] && v <= ends[1]).length > 1 && ends[1] - ends[0] > 0.03 * (x[x.length - 1] - x[0])) { range = ends; draw(); }
        from = null;
      });
      canvas.addEventListener("dblclick", () => { range = null; draw(); });
      canvas.addEventListener("pointermove", (event) => {
        const at = event.clientX - canvas.getBoundingClientRect().left;
        let best = 0;
        x.forEach((v, i) => { if (Math.abs(scale.sx(v) - at) < Math.abs(scale.sx(x[best]) - at)) best = i; });
        const where = panel.x_texts ? `${panel.x_name} ${panel.x_texts[x[best]]}` : `step ${x[best]}`;
        tip.show(event, [where, ...series.filter((s) => s.y[best] !== null).map((s) => `${s.name} ${short(s.y[best])}`.trim())].join(", "));
      });
      canvas.addEventListener("pointerleave", () => tip.hide());
      return draw;
    });
    const legend = make("div", plot, "legend");
    const names = [...new Map(spec.panels.flatMap((p) => p.series.map((s, i) => [s.name, i]))).entries()].filter((n) => n[0]);
    if (names.length > 1 && spec.panels.some((p) => p.series.length > 1)) {
      for (const [name, i] of names) {
        const item = make("span", legend);
        const pen = canvasOf(make("canvas", item), 26, 10);
        stroke(pen, [0, 26], [5, 5], (v) => v, (v) => v, LINES[i % 6], DASHES[i % 6]);
        item.append(name);
      }
    }
    for (const panel of spec.panels) if (panel.threshold_text && panel.threshold <= panel.high * 1.05) make("span", legend, "", `orange dashes: ${panel.threshold_text}`);
    for (const text of new Set((spec.marks || []).map((m) => m[1]))) make("span", legend, "", `dashed upright: ${text}`);
    return () => { drawers.forEach((draw) => draw()); plot.dataset.drawn = "yes"; };
  };

  // ---- lanes: loss on top, what happened below ----------------------------------------------------------------------
  const lanes = (plot, spec) => {
    const canvas = make("canvas", plot);
    const tip = tipOf(plot);
    let boxes = [];
    const draw = () => {
      const width = plot.clientWidth, top = spec.loss.length > 1 ? 130 : 0, narrow = width < 520, row = narrow ? 34 : 24, height = top + spec.lanes.length * row + 38;
      const pen = canvasOf(canvas, width, height);
      const highest = top ? `loss ${short(Math.max(...spec.loss.map((p) => p[1])))}` : "";
      const named = [highest, ...spec.lanes.map((l) => l.name)].map((name) => pen.measureText(name).width);
      const left = narrow ? 8 : Math.ceil(Math.max(40, ...named)) + 12;
      const sx = (v) => left + (v / spec.end) * (width - left - 12);
      pen.textBaseline = "middle";
      if (top) {
        const y = spec.loss.map((p) => p[1]), low = Math.min(...y), high = Math.max(...y) + 1e-9;
        const sy = (v) => top - 22 - ((v - low) / (high - low)) * (top - 34);
        stroke(pen, spec.loss.map((p) => p[0]), y, sx, sy, LINES[0], []);
        pen.fillStyle = SOFT;
        pen.textAlign = narrow ? "left" : "right";
        const at = narrow ? left : left - 8;
        pen.fillText(highest, at, narrow ? 6 : 14);
        pen.fillText(short(low), at, top - 20);
      }
      boxes = [];
      spec.lanes.forEach((lane, i) => {
        const y = top + i * row;
        pen.fillStyle = i % 2 ? PAPER : GROUND;
        pen.fillRect(0, y, width, row);
        for (const [from, to, text] of lane.spans) {
          const x = sx(from), wide = Math.max(4, sx(to) - x);
          pen.fillStyle = LINES[i % 6];
          pen.globalAlpha = 0.75;
          pen.fillRect(x, y + row - 18, wide, 12);
          pen.globalAlpha = 1;
          boxes.push({ x, y, wide, row, text: `${lane.name}, ${text}: step ${from}${to > from ? ` to ${to}` : ""}` });
        }
        pen.fillStyle = INK;
        pen.textAlign = narrow ? "left" : "right";
        pen.fillText(lane.name, narrow ? left : left - 8, narrow ? y + 8 : y + row / 2);
      });
      pen.fillStyle = SOFT;
      pen.textAlign = "center";
      for (const tick of ticks(0, spec.end, Math.max(2, width / 120)).filter(Number.isInteger)) pen.fillText(String(tick), Math.min(sx(tick), width - 18), height - 24);
      pen.fillText("step", (left + width) / 2, height - 9);
      plot.dataset.drawn = "yes";
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      const hit = boxes.find((b) => x >= b.x - 3 && x <= b.x + b.wide + 3 && y >= b.y && y < b.y + b.row);
      if (hit) tip.show(event, hit.text); else tip.hide();
    });
    canvas.addEventListener("pointerleave", () => tip.hide());
    return draw;
  };

  const kinds = { grid, lines, lanes };
  const drawers = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const spec = specs[plot.dataset.figure];
    const draw = kinds[spec.kind](plot, spec);
    draw();
    drawers.push(draw);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours(); drawers.forEach((draw) => draw()); });
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => drawers.forEach((draw) => draw()));
  });
})();
