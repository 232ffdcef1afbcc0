// The text of a trace: a colour for the first expert of every token, a slider over the layers, all experts of one token.
(() => {
  const data = JSON.parse(document.getElementById("chronomoe-page").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const lazy = (layer) => layer.ready || (layer.ready = {
    index: new Uint16Array(bytes(layer.index)), weight: layer.weight ? new Uint16Array(bytes(layer.weight)) : null,
    margin: new Int16Array(bytes(layer.margin)), next: new Uint16Array(bytes(layer.next)), dropped: new Set(layer.dropped),
  });
  const NONE = 65535, slider = document.getElementById("layer"), numbers = document.getElementById("numbers");
  const detail = document.getElementById("detail"), keys = document.getElementById("keys"), count = data.pieces.length;
  const special = new Set(data.special), starts = new Set(data.starts);
  const weightOf = (layer, at) => layer.weight ? lazy(layer).weight[at] / 65535 * layer.top : null;
  const firstOf = (layer, token) => {
    const ready = lazy(layer);
    let best = token * layer.k;
    if (ready.weight) for (let at = best + 1; at < (token + 1) * layer.k; at++) if (ready.weight[at] > ready.weight[best]) best = at;
    return ready.index[best];
  };
  const panes = [...document.querySelectorAll(".text")].map((pane) => {
    const spans = [];
    data.pieces.forEach((piece, token) => {
      if (starts.has(token)) pane.append(document.createElement("hr"));
      const span = document.createElement("span");
      span.className = "t";
      span.dataset.token = token;
      span.append(piece, document.createElement("sup"));
      pane.append(span);
      spans.push(span);
    });
    return spans;
  });
  let layer = 0, only = null, now = null;
  const draw = () => {
    const places = new Map(data.keys[layer].map((expert, at) => [expert, at]));
    panes.forEach((spans, model) => {
      const own = data.models[model].layers[layer];
      spans.forEach((span, token) => {
        const first = firstOf(own, token);
        const other = model === 1 && firstOf(data.models[0].layers[layer], token) !== first;
        span.className = "t" + (first === NONE ? "" : ` k${places.has(first) ? places.get(first) : 8}`) + (special.has(token) ? " special" : "")
          + (only !== null && first !== only ? " dim" : "") + (other ? " other" : "") + (token === now ? " now" : "");
        span.dataset.expert = first === NONE ? "" : first;
        span.lastChild.textContent = numbers.checked && first !== NONE ? first : "";
      });
    });
    document.getElementById("shown").textContent = `layer ${data.models[0].layers[layer].label}`;
    document.getElementById("said").textContent = data.sentences[layer];
    keys.textContent = "";
    data.keys[layer].forEach((expert, at) => {
      const button = document.createElement("button"), swatch = document.createElement("span");
      button.type = "button";
      swatch.className = `swatch k${at}`;
      button.append(swatch, `expert ${expert}`);
      button.setAttribute("aria-pressed", String(only === expert));
      button.addEventListener("click", () => { only = only === expert ? null : expert; draw(); });
      keys.append(button);
    });
    if (data.models.some((m) => m.layers[layer].experts > data.keys[layer].length)) {
      const rest = document.createElement("button"), swatch = document.createElement("span");
      rest.type = "button";
      rest.disabled = true;
      swatch.className = "swatch k8";
      rest.append(swatch, "all others");
      keys.append(rest);
    }
    if (now !== null) tell(now);
    document.getElementById("tokens").dataset.layer = layer;
  };
  const row = (parent, cells, kind) => {
    const line = document.createElement("tr");
    for (const cell of cells) { const box = document.createElement(kind); box.textContent = cell; line.append(box); }
    parent.append(line);
  };
  const tell = (token) => {
    detail.textContent = "";
    const head = document.createElement("div"), bold = document.createElement("b");
    bold.textContent = JSON.stringify(data.pieces[token]);
    head.append(bold, ` token ${token}`);
    detail.append(head);
    for (const model of data.models) {
      const own = model.layers[layer], ready = lazy(own), table = document.createElement("table");
      if (ready.index[token * own.k] === NONE) { detail.append(`layer ${own.label} of ${model.name} does not route this token`); continue; }
      const slots = [...Array(own.k).keys()].map((slot) => token * own.k + slot);
      if (ready.weight) slots.sort((a, b) => ready.weight[b] - ready.weight[a]);
      row(table, [data.models.length > 1 ? model.name : "", "expert", "weight", "phi"], "th");
      for (const at of slots) {
        const expert = ready.index[at], weight = weightOf(own, at), phi = own.phi[expert];
        row(table, ["", expert, (weight === null ? "in its block" : weight.toFixed(4)) + (ready.dropped.has(at) ? " (dropped: over capacity)" : ""),
          phi === null || phi === undefined ? "-" : phi.toFixed(2)], "td");
      }
      detail.append(table);
      const margin = document.createElement("div"), next = ready.next[token];
      margin.textContent = next === NONE ? "every expert is chosen" : `margin to the next expert (${next}): ${(ready.margin[token] / 32767).toFixed(4)}`;
      detail.append(margin);
    }
  };
  const at = (event) => { const span = event.target.closest(".t"); return span ? Number(span.dataset.token) : null; };
  const point = (token) => {
    if (token === null || token === now) return;
    for (const spans of panes) { if (now !== null) spans[now].classList.remove("now"); spans[token].classList.add("now"); }
    now = token;
    tell(token);
  };
  for (const pane of document.querySelectorAll(".text")) {
    pane.addEventListener("pointerover", (event) => point(at(event)));
    pane.addEventListener("click", (event) => point(at(event)));
    pane.tabIndex = 0;
    pane.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      point(Math.max(0, Math.min(count - 1, (now === null ? -1 : now) + step)));
    });
  }
  slider.addEventListener("input", () => { layer = Number(slider.value); only = null; draw(); });
  numbers.addEventListener("change", draw);
  draw();
})();
