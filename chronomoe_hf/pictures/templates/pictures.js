"use strict";
// Pictures: tips, zoom, views, saving; tables that sort; words with an entry in the glossary.
(() => {
  const make = (tag, parent, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const holder = document.getElementById("chronomoe-pictures");
  const specs = holder ? JSON.parse(holder.textContent) : {};
  const shown = (value) => typeof value !== "number" || Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
  const valueOf = (column, at) => Array.isArray(column) ? column[at] : column.words[column.at[at]];
  const words = (names, columns, at) => names.map((name, i) => [name, valueOf(columns[i], at)]).filter((p) => p[1] !== null)
    .map(([name, value]) => `${name} ${shown(value)}`.trim()).join(", ");
  const find = (list, tables, x, y) => {
    for (const places of list) {
      let before = 0;
      for (const [left, top, width, height, rows, columns] of places.grids) {
        const column = Math.floor((x - left) / width), row = Math.floor((y - top) / height);
        if (column >= 0 && row >= 0 && column < columns && row < rows) return words(places.names, tables[places.columns], before + row * columns + column);
        before += rows * columns;
      }
    }
    return null;
  };
  const where = (svg, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());

  const alive = (picture, view, places, tables) => {
    const svg = view.querySelector("svg"), whole = svg.getAttribute("viewBox").split(" ").map(Number);
    let box = [...whole], from = null;
    const apply = () => {
      box[2] = Math.min(box[2], whole[2]); box[3] = Math.min(box[3], whole[3]);
      box[0] = Math.max(0, Math.min(box[0], whole[2] - box[2])); box[1] = Math.max(0, Math.min(box[1], whole[3] - box[3]));
      svg.setAttribute("viewBox", box.map((v) => v.toFixed(2)).join(" "));
      picture.dataset.zoom = (whole[2] / box[2]).toFixed(2);
      svg.style.touchAction = box[2] < whole[2] ? "none" : "pan-y";
    };
    const zoom = (factor, x = box[0] + box[2] / 2, y = box[1] + box[3] / 2) => {
      const scale = Math.max(0.04, Math.min(1, (box[2] / whole[2]) / factor)), width = whole[2] * scale, height = whole[3] * scale;
      box = [x - (x - box[0]) * width / box[2], y - (y - box[1]) * height / box[3], width, height];
      apply();
    };
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const at = where(svg, event);
      zoom(event.deltaY < 0 ? 1.25 : 0.8, at.x, at.y);
    }, { passive: false });
    svg.addEventListener("dblclick", (event) => { const at = where(svg, event); zoom(2, at.x, at.y); });
    svg.addEventListener("pointerdown", (event) => { if (box[2] < whole[2]) { from = where(svg, event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointerup", () => { from = null; });
    const tip = picture.tip;
    svg.addEventListener("pointermove", (event) => {
      const at = where(svg, event);
      if (from) { box[0] += from.x - at.x; box[1] += from.y - at.y; apply(); tip.hidden = true; return; }
      const text = find(places, tables, at.x, at.y);
      tip.hidden = text === null;
      if (text === null) return;
      tip.textContent = text;
      const edge = picture.getBoundingClientRect(), x = event.clientX - edge.left, y = event.clientY - edge.top;
      tip.style.left = `${Math.max(0, Math.min(x + 12, edge.width - tip.offsetWidth))}px`;
      tip.style.top = `${y + 16}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
    return { zoom, reset() { box = [...whole]; apply(); } };
  };
  const give = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const save = (picture, svg, kind) => {
    const copy = svg.cloneNode(true), style = getComputedStyle(picture), size = svg.viewBox.baseVal;
    copy.setAttribute("width", size.width); copy.setAttribute("height", size.height); copy.setAttribute("color", style.color);
    const ground = document.createElementNS(svg.namespaceURI, "rect");
    for (const [name, value] of Object.entries({ x: size.x, y: size.y, width: size.width, height: size.height })) ground.setAttribute(name, value);
    ground.setAttribute("fill", getComputedStyle(picture.closest("section") || document.body).backgroundColor);
    copy.prepend(ground);
    const blob = new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }), name = `chronomoe_${picture.dataset.picture}`;
    if (kind === "SVG") return give(blob, `${name}.svg`);
    const image = new Image(), url = URL.createObjectURL(blob);
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * size.width; canvas.height = 2 * size.height;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      URL.revokeObjectURL(url);
      canvas.toBlob((png) => give(png, `${name}.png`), "image/png");
    };
    image.src = url;
  };
  const wrapped = (pen, text, width) => text.split(/\s+/).reduce((rows, word) => {
    const longer = `${rows[rows.length - 1]} ${word}`.trim();
    return pen.measureText(longer).width <= width ? [...rows.slice(0, -1), longer] : [...rows, word];
  }, [""]);
  // A chart drawn on canvases, with its heading, sentence and legend, as one image.
  const composed = (plot) => {
    const section = plot.closest("section"), edge = plot.getBoundingClientRect(), own = getComputedStyle(section), ratio = Math.max(2, window.devicePixelRatio || 1), rim = 14;
    const image = document.createElement("canvas"), pen = image.getContext("2d"), family = own.fontFamily;
    pen.font = `14px ${family}`;
    const rows = wrapped(pen, section.querySelector(".sentence").textContent, edge.width), head = 44 + 20 * rows.length;
    image.width = (edge.width + 2 * rim) * ratio; image.height = (edge.height + head + rim) * ratio;
    pen.scale(ratio, ratio);
    pen.fillStyle = own.backgroundColor; pen.fillRect(0, 0, edge.width + 2 * rim, edge.height + head + rim);
    pen.fillStyle = own.color; pen.font = `600 17px ${family}`; pen.fillText(section.querySelector("h2").textContent, rim, 26);
    pen.font = `14px ${family}`; rows.forEach((row, i) => pen.fillText(row, rim, 48 + 20 * i));
    pen.translate(rim - edge.left, head - edge.top);
    for (const canvas of plot.querySelectorAll("canvas")) {
      const box = canvas.getBoundingClientRect();
      if (box.width && box.height) pen.drawImage(canvas, box.left, box.top, box.width, box.height);
    }
    pen.textBaseline = "middle";
    const texts = document.createTreeWalker(plot, NodeFilter.SHOW_TEXT), range = document.createRange();
    while (texts.nextNode()) {
      const text = texts.currentNode, style = getComputedStyle(text.parentElement);
      range.selectNodeContents(text);
      const box = range.getBoundingClientRect();
      if (!box.width || !text.textContent.trim()) continue;
      pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`; pen.fillStyle = style.color;
      pen.fillText(text.textContent.replace(/\s+/g, " "), box.left, (box.top + box.bottom) / 2);
    }
    return image;
  };
  for (const plot of document.querySelectorAll(".plot")) {
    const tools = make("div", plot.parentElement, "tools"), button = make("button", tools, "tool", "PNG");
    plot.after(tools);
    button.type = "button"; button.title = "save what is shown as PNG";
    button.addEventListener("click", () => composed(plot).toBlob((png) => give(png, `chronomoe_${plot.dataset.figure}.png`), "image/png"));
  }
  for (const picture of document.querySelectorAll(".picture")) {
    const spec = specs[picture.dataset.picture];
    picture.tip = make("div", picture, "tip");
    picture.tip.hidden = true;
    const views = [...picture.querySelectorAll(".view")];
    const hands = views.map((view) => alive(picture, view, spec.views[Number(view.dataset.view)][view.classList.contains("narrow") ? 1 : 0], spec.columns));
    const now = () => views.findIndex((view) => view.getClientRects().length > 0);
    const tools = make("div", picture, "tools");
    const tool = (text, title, act) => { const button = make("button", tools, "tool", text); button.type = "button"; button.title = title; button.addEventListener("click", act); };
    tool("+", "closer (also: double click, or Ctrl and the wheel)", () => hands[now()].zoom(1.5));
    tool("\u2212", "further away", () => hands[now()].zoom(1 / 1.5));
    tool("whole", "show all of it", () => hands[now()].reset());
    tool("SVG", "save what is shown as SVG", () => save(picture, views[now()].querySelector("svg"), "SVG"));
    tool("PNG", "save what is shown as PNG", () => save(picture, views[now()].querySelector("svg"), "PNG"));
    for (const choice of picture.querySelectorAll(".choice")) {
      choice.addEventListener("click", () => {
        for (const view of views) view.hidden = view.dataset.view !== choice.dataset.view;
        for (const other of picture.querySelectorAll(".choice")) other.setAttribute("aria-pressed", String(other === choice));
      });
    }
    picture.dataset.drawn = "yes";
  }

  // ---- tables -------------------------------------------------------------------------------------------------------
  const key = (text) => { const number = parseFloat(text.replace(/[,\u00a0%+]/g, "").replace("\u2212", "-")); return Number.isNaN(number) ? text : number; };
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending", body = table.tBodies[0];
        for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [key(row.cells[column].textContent), row]);
        rows.sort(([a], [b]) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? 1 : -1) * (down ? -1 : 1));
        body.append(...rows.map((pair) => pair[1]));
      });
    });
  }

  // ---- words --------------------------------------------------------------------------------------------------------
  const entries = [...document.querySelectorAll("#glossary [data-term]")];
  if (entries.length) {
    const spell = new Map();
    for (const entry of entries) for (const name of [entry.dataset.term, ...entry.dataset.also.split("|")]) if (name) spell.set(name.toLowerCase(), entry);
    const plain = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const pattern = new RegExp(`(?<![\\w-])(${[...spell.keys()].sort((a, b) => b.length - a.length).map(plain).join("|")})(?![\\w-])`, "i");
    const entry = make("div", document.body, "entry");
    entry.hidden = true;
    entry.setAttribute("role", "status");
    const open = (button, found) => {
      entry.textContent = "";
      make("b", entry, "", `${found.dataset.term}: `);
      entry.append(found.querySelector("dd").textContent);
      entry.hidden = false;
      const at = button.getBoundingClientRect();
      entry.style.left = `${Math.max(6, Math.min(at.left, document.documentElement.clientWidth - entry.offsetWidth - 6)) + window.scrollX}px`;
      entry.style.top = `${at.bottom + window.scrollY + 6}px`;
    };
    const shut = () => { entry.hidden = true; };
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") shut(); });
    document.addEventListener("click", (event) => { if (!event.target.closest(".term, .entry")) shut(); });
    const everywhere = new Set();
    for (const scope of document.querySelectorAll(".sentence, .note, .findings p, .numbers dt, .panels h3")) {
      const seen = new Set(), walker = document.createTreeWalker(scope, NodeFilter.SHOW_TEXT), texts = [];
      while (walker.nextNode()) if (!walker.currentNode.parentElement.closest("code, button, .text")) texts.push(walker.currentNode);
      for (let text of texts) {
        for (let hit = pattern.exec(text.data), tries = 0; hit && tries < 12; tries++) {
          const found = spell.get(hit[1].toLowerCase());
          const rest = text.splitText(hit.index + hit[1].length);
          if (!(found.hasAttribute("data-once") ? everywhere : seen).has(found)) {
            seen.add(found);
            everywhere.add(found);
            const word = text.splitText(hit.index), button = document.createElement("button");
            button.type = "button";
            button.className = "term";
            button.append(word.cloneNode());
            word.replaceWith(button);
            button.addEventListener("click", () => open(button, found));
          }
          text = rest;
          hit = pattern.exec(text.data);
        }
      }
    }
  }
})();
