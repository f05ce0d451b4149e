"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const holder = document.getElementById("models-data");
  if (holder === null) return;
  const { best, bit, models } = JSON.parse(holder.textContent);
  const marks = all(".model");
  const bars = all("#bars rect");
  const ticks = all("#bars .tick");
  const rows = all("#layers tbody tr");
  const rest = all("#layers tfoot tr");
  const scores = new Map();
  for (const mark of all(".score")) {
    const { kind, layer, bits } = mark.dataset;
    const key = `${kind} ${layer} ${bits}`;
    scores.set(key, [...(scores.get(key) ?? []), mark]);
  }
  let chosen = best;
  let ringed = all(".score.chosen");

  const fill = (row, cells) => {
    [...row.querySelectorAll("td")].forEach((cell, i) => {
      cell.querySelector("span").textContent = cells[i];
      cell.querySelector(".share rect")?.setAttribute("width", `${Math.min(100, cells[i] || 0)}%`);
    });
  };

  // What the page says of one model; the chosen one, or the one under the pointer.
  const show = (id) => {
    const model = models[id];
    document.getElementById("model-name").textContent = model.title;
    document.getElementById("model-facts").textContent = model.summary;
    bars.forEach((bar, i) => {
      const bits = model.weight[i];
      const bottom = Number(bar.getAttribute("y")) + Number(bar.getAttribute("height"));
      bar.setAttribute("class", `b${bits}`);
      bar.setAttribute("height", bit * bits);
      bar.setAttribute("y", bottom - bit * bits);
      bar.querySelector("title").textContent = `${bar.dataset.name}: ${bits} bits`;
      const tick = ticks[i];
      for (const end of tick ? ["y1", "y2"] : []) {
        tick.setAttribute(end, bottom - bit * Math.min(model.act[i], 9));
      }
    });
    rows.forEach((row, i) => fill(row, model.rows[i]));
    rest.forEach((row, i) => fill(row, model.rest[i].slice(1)));
    for (const mark of ringed) mark.classList.remove("chosen");
    ringed = rows.flatMap((_, i) => [
      ...(scores.get(`weights ${i} ${model.weight[i]}`) ?? []),
      ...(scores.get(`inputs ${i} ${model.act[i]}`) ?? []),
    ]);
    for (const mark of ringed) mark.classList.add("chosen");
    for (const curve of all("[data-curve]")) {
      curve.classList.toggle("thick", curve.dataset.curve === id);
      if (curve.dataset.curve === id) curve.parentNode.append(curve);  // above the others
    }
  };

  const choose = (id) => {
    chosen = id;
    for (const mark of marks) {
      const on = mark.dataset.point === id;
      mark.setAttribute("aria-checked", on);
      mark.setAttribute("tabindex", on ? 0 : -1);
    }
    for (const link of all("[data-choose]")) {
      if (link.dataset.choose === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    show(id);
  };

  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  marks.forEach((mark, i) => {
    const { point } = mark.dataset;
    mark.addEventListener("pointerenter", () => show(point));
    mark.addEventListener("pointerleave", () => show(chosen));
    mark.addEventListener("click", () => {
      choose(point);
      mark.focus();
    });
    mark.addEventListener("keydown", (event) => {
      const { key } = event;
      let next = null;
      if (key in steps) next = (i + steps[key] + marks.length) % marks.length;
      else if (key === "Home") next = 0;
      else if (key === "End") next = marks.length - 1;
      else if (key === "Enter" || key === " ") next = i;
      if (next === null) return;
      event.preventDefault();
      choose(marks[next].dataset.point);
      marks[next].focus();
    });
  });
  for (const link of all("[data-choose]")) {
    link.addEventListener("click", () => choose(link.dataset.choose));
  }
  choose(best);
})();
