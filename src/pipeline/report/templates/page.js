"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http:" + "//www.w3.org/2000/svg"; // a name, nothing is loaded from it
  const shown = (v) => (Number.isInteger(v) ? String(v) : String(Number(v.toPrecision(4))));
  const nearest = (xs, x) => {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    return best;
  };
  const line = (figure, colour, head, text) => {
    const div = document.createElement("div");
    if (head) div.className = "head"; else div.style.setProperty("--k", `var(--c${colour})`);
    div.textContent = text;
    figure.append(div);
  };
  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const { box, x, y, kind, xlabel, curves, colours } = data[figure.dataset.figure];
    const svg = figure.querySelector("svg.plot");
    const [left, top, width, height] = box;
    const px = (v) => left + ((v - x[0]) / (x[1] - x[0])) * width;
    const py = (v) => top + (1 - (v - y[0]) / (y[1] - y[0])) * height;
    const marks = document.createElementNS(NS, "g");
    svg.append(marks);
    const tip = document.createElement("div");
    tip.className = "tip"; tip.hidden = true;
    figure.append(tip);
    const mark = (name, values, style) => {
      const node = document.createElementNS(NS, name);
      for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
      node.setAttribute("style", style);
      marks.append(node);
    };
    const hide = () => { tip.hidden = true; marks.replaceChildren(); };
    const show = (event) => {
      const rect = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / rect.width;
      const at = [(event.clientX - rect.left) * scale, (event.clientY - rect.top) * scale];
      if (at[0] < left - 8 || at[0] > left + width + 8) return hide();
      const value = x[0] + ((at[0] - left) / width) * (x[1] - x[0]);
      let found = curves.map((curve, i) => ({ curve, i, k: nearest(curve.x, value) }));
      if (kind === "points") {
        let best = null;
        curves.forEach((curve, i) => curve.x.forEach((v, k) => {
          const far = Math.hypot(px(v) - at[0], py(curve.y[k]) - at[1]);
          if (!best || far < best.far) best = { curve, i, k, far };
        }));
        found = best ? [best] : [];
      }
      if (!found.length) return hide();
      found.sort((a, b) => Math.abs(a.curve.x[a.k] - value) - Math.abs(b.curve.x[b.k] - value));
      const first = found[0].curve.x[found[0].k];
      const many = found.length > 9;
      if (many) found.sort((a, b) => Math.abs(py(a.curve.y[a.k]) - at[1]) - Math.abs(py(b.curve.y[b.k]) - at[1]));
      else found.sort((a, b) => a.i - b.i);
      marks.replaceChildren(); tip.replaceChildren();
      if (kind !== "points") mark("line", { x1: px(first), x2: px(first), y1: top, y2: top + height }, "stroke:var(--soft);stroke-width:.8");
      line(tip, 0, true, `${xlabel} ${shown(first)}`);
      for (const { curve, i, k } of found.slice(0, 9)) {
        const apart = curve.x[k] !== first ? ` (${xlabel} ${shown(curve.x[k])})` : "";
        const more = curve.more ? ` · ${curve.more[k]}` : apart;
        line(tip, colours[i], false, `${curve.label} ${shown(curve.y[k])}${more}`);
        if (kind !== "stack") mark("circle", { cx: px(curve.x[k]), cy: py(curve.y[k]), r: 3.6 }, `fill:var(--c${colours[i]});stroke:var(--card)`);
      }
      if (kind === "stack") line(tip, 0, true, `together ${shown(found.reduce((sum, { curve, k }) => sum + curve.y[k], 0))}`);
      tip.hidden = false;
      const place = event.clientX - figure.getBoundingClientRect().left;
      const room = figure.clientWidth - tip.offsetWidth - 6;
      tip.style.left = `${Math.max(6, Math.min(room, place > figure.clientWidth / 2 ? place - tip.offsetWidth - 14 : place + 14))}px`;
      tip.style.top = `${rect.top - figure.getBoundingClientRect().top + 6}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) { button.hidden = true; continue; }
    button.addEventListener("click", () => {
      navigator.clipboard.writeText(document.getElementById(button.dataset.of).textContent).then(() => {
        button.textContent = "copied";
        setTimeout(() => { button.textContent = "copy"; }, 1500);
      });
    });
  }
})();
