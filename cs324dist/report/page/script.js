{
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const element = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  const nearest = (points, x) => points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  // The charts of one section: they share the runs shown, the steps shown, and the cursor.
  function curves(group) {
    const switches = new Map(all(group, "[type=checkbox]").map((box) => [box.dataset.run, box]));
    const charts = all(group, ".chart").map((figure) => ({
      plot: figure.querySelector(".plot"),
      unit: figure.dataset.unit,
      reference: "reference" in figure.dataset ? [[+figure.dataset.reference]] : [],
      marks: [],
      restarts: all(figure, ".restart"),
      curves: all(figure, ".curve").map((path) => ({
        run: path.dataset.run,
        look: path.getAttribute("class"),
        points: [...path.getAttribute("d").matchAll(/[ML]([^ ]+) ([^MLh]+)/g)].map((match) => [+match[1], +match[2]]),
      })),
    }));
    // How many processes ran a run at a step; nothing for a run that was never continued.
    const starts = new Map([...switches].map(([run, box]) => [run, Object.entries(JSON.parse(box.dataset.starts))]));
    const processes = (run, step) => {
      const count = starts.get(run).length > 1 && starts.get(run).filter(([from]) => +from < step).at(-1)?.[1];
      return count ? ` (${count} process${count > 1 ? "es" : ""})` : "";
    };
    const last = +group.querySelector(".chart").dataset.last;
    const spoken = group.querySelector(":scope > output");
    let view = [0, last], at = null;

    const shown = (chart) => chart.curves.filter((curve) => switches.get(curve.run).checked);
    const within = (points) => points.filter(([x]) => x >= view[0] && x <= view[1]);
    const steps = () => [...new Set(charts.flatMap(shown).flatMap((c) => within(c.points)).map(([x]) => x))].sort((a, b) => a - b);

    function draw() {
      for (const chart of charts) {
        const { plot, unit } = chart;
        const values = shown(chart).map((curve) => within(curve.points).map(([, y]) => y)).filter((ys) => ys.length);
        const y = limits(values.length ? [...values, ...chart.reference] : [[0, 1]], values.length ? unit : "");
        const across = 1000 / (view[1] - view[0]), down = 1000 / (y[0] - y[1]);
        plot.querySelector(".data").setAttribute("transform", `matrix(${across} 0 0 ${down} ${-view[0] * across} ${-y[1] * down})`);
        chart.left = (step) => `${(100 * (step - view[0])) / (view[1] - view[0])}%`;
        chart.bottom = (value) => `${(100 * (value - y[0])) / (y[1] - y[0])}%`;
        const ofY = unit === "log" && values.length ? logTicks(y).map((v) => [Math.log10(v), number(v)]) : ticks(y).map((v) => [v, formatted(v, unit)]);
        plot.querySelector(".y-axis").replaceChildren(...ofY.map(([value, label]) => {
          const line = element("div", "");
          line.style.bottom = chart.bottom(value);
          line.append(element("span", "", label));
          return line;
        }));
        plot.querySelector(".x-axis").replaceChildren(...ticks(view).filter(Number.isInteger).map((step) => {
          const label = element("span", "", number(step));
          label.style.left = chart.left(step);
          return label;
        }));
        for (const restart of chart.restarts) {
          const step = +restart.dataset.step;
          restart.style.left = chart.left(step);
          restart.hidden = step < view[0] || step > view[1];
        }
        const reference = plot.querySelector("span.reference");
        if (reference) {
          reference.style.bottom = chart.bottom(chart.reference[0][0]);
          reference.classList.toggle("below", parseFloat(reference.style.bottom) > 85);
        }
      }
      mark();
    }

    function mark() {
      for (const chart of charts) {
        chart.marks.forEach((node) => node.remove());
        chart.marks = [];
        chart.said = "";
        const found = at === null ? [] : shown(chart)
          .map((curve) => ({ ...curve, points: within(curve.points) }))
          .filter((curve) => curve.points.length && at <= curve.points.at(-1)[0])
          .map((curve) => ({ ...curve, point: nearest(curve.points, at) }));
        if (!found.length) continue;
        const cursor = element("div", "cursor"), readout = element("div", "readout");
        cursor.style.left = chart.left(at);
        readout.style[at - view[0] > (view[1] - view[0]) / 2 ? "left" : "right"] = "0.5rem";
        readout.append(element("div", "", `step ${number(at)}`));
        chart.marks = [cursor, readout];
        for (const { run, look, point } of found) {
          const dot = element("div", `dot ${look}`), row = element("div", "");
          dot.style.left = chart.left(point[0]);
          dot.style.bottom = chart.bottom(point[1]);
          const value = chart.unit === "log" ? 10 ** point[1] : point[1];
          const swatch = switches.get(run).parentElement.querySelector("svg").cloneNode(true);
          const name = switches.get(run).parentElement.textContent.trim();
          row.append(swatch, element("span", "", name + processes(run, point[0])), element("b", "", formatted(value, chart.unit)));
          readout.append(row);
          chart.marks.push(dot);
        }
        chart.plot.append(...chart.marks);
        chart.said = all(readout, "div").map((row) => [...row.childNodes].map((part) => part.textContent).join(" ")).join("; ");
      }
    }

    function zoom(factor, centre = at ?? (view[0] + view[1]) / 2) {
      const width = Math.min(Math.max((view[1] - view[0]) * factor, Math.min(4, last)), last);
      const start = Math.min(Math.max(centre - ((centre - view[0]) * width) / (view[1] - view[0]), 0), last - width);
      view = factor === Infinity ? [0, last] : [start, start + width];
      draw();
    }

    function move(by, chart) {
      const known = steps();
      if (!known.length) return;
      const here = at === null ? (by > 0 ? -1 : known.length) : known.indexOf(nearest(known.map((x) => [x]), at)[0]);
      at = known[Math.min(Math.max(here + by, 0), known.length - 1)];
      mark();
      spoken.textContent = chart.said;
    }

    const zooms = { in: () => zoom(0.5), out: () => zoom(2), all: () => zoom(Infinity) };
    const keys = {
      ArrowRight: (chart, much) => move(much ? 10 : 1, chart),
      ArrowLeft: (chart, much) => move(much ? -10 : -1, chart),
      Home: (chart) => move(-Infinity, chart),
      End: (chart) => move(Infinity, chart),
      "+": zooms.in, "=": zooms.in, "-": zooms.out, 0: zooms.all,
      Escape: () => { at = null; zooms.all(); },
    };

    for (const chart of charts) {
      const { plot } = chart;
      const step = (event) => {
        const box = plot.getBoundingClientRect();
        return view[0] + Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * (view[1] - view[0]);
      };
      let from = null;
      const chosen = element("div", "chosen");
      Object.assign(plot, { tabIndex: 0, role: "group", ariaLabel: plot.querySelector("svg").getAttribute("aria-label"),
        ariaDescription: "Arrow keys move through the steps, plus and minus zoom, Escape shows all." });
      plot.addEventListener("keydown", (event) => {
        if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        keys[event.key](chart, event.shiftKey);
      });
      plot.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        from = step(event);
        plot.setPointerCapture(event.pointerId);
      });
      plot.addEventListener("pointermove", (event) => {
        const known = steps();
        at = known.length ? nearest(known.map((x) => [x]), step(event))[0] : null;
        mark();
        if (from === null) return;
        chosen.style.left = chart.left(Math.min(from, step(event)));
        chosen.style.width = chart.left(view[0] + Math.abs(step(event) - from));
        plot.append(chosen);
      });
      plot.addEventListener("pointerup", (event) => {
        const ends = [from, step(event)].sort((a, b) => a - b);
        chosen.remove();
        if (from !== null && ends[1] - ends[0] > (view[1] - view[0]) / 50) { view = ends; draw(); }
        from = null;
      });
      plot.addEventListener("pointercancel", () => { from = null; chosen.remove(); });
      plot.addEventListener("pointerleave", () => { at = null; mark(); });
      plot.addEventListener("blur", () => { at = null; mark(); });
      plot.addEventListener("dblclick", zooms.all);
    }
    for (const box of switches.values()) box.addEventListener("change", draw);
    for (const button of all(group, "[data-zoom]")) button.addEventListener("click", zooms[button.dataset.zoom]);
    group.querySelector(".zoom").hidden = false;
    draw();
  }

  // A slider through pictures, and a button that moves it.
  function player(root) {
    const frames = JSON.parse(root.querySelector("script").textContent);
    const button = root.querySelector(".play"), slider = root.querySelector("[type=range]"), label = root.querySelector("output");
    const pictures = all(root, "[data-alt]"), counts = root.querySelector(".counts");
    const name = button.ariaLabel.replace("Play ", "");
    let timer = null, direction = 1;

    function show() {
      const frame = frames[+slider.value];
      pictures.forEach((picture, k) => { picture.src = frame.sources[k]; picture.alt = picture.dataset.alt + frame.label; });
      label.textContent = slider.ariaValueText = frame.label;
      if (!counts) return;
      counts.style.visibility = frame.shares ? "visible" : "hidden";
      (frame.shares ?? []).forEach((share, digit) => {
        const bar = counts.querySelectorAll("li")[digit];
        bar.style.setProperty("--share", share);
        bar.querySelector("b").textContent = (100 * share).toFixed(1);
      });
    }

    function pause() {
      clearInterval(timer);
      timer = null;
      button.classList.remove("on");
      button.ariaLabel = `Play ${name}`;
    }

    function advance() {
      const next = +slider.value + direction;
      if (next >= 0 && next < frames.length) slider.value = next;
      else if ("returns" in root.dataset) slider.value = +slider.value + (direction = -direction);
      else return pause();
      show();
    }

    button.addEventListener("click", () => {
      if (timer !== null) return pause();
      if (!("returns" in root.dataset) && +slider.value === frames.length - 1) { slider.value = 0; show(); }
      button.classList.add("on");
      button.ariaLabel = `Pause ${name}`;
      timer = setInterval(advance, calm.matches ? 1000 : +root.dataset.pause);
    });
    slider.addEventListener("input", () => { pause(); show(); });
    slider.max = frames.length - 1;
    slider.value = slider.defaultValue;
    root.querySelector(".controls").hidden = false;
    show();
  }

  all(document, ".curves").forEach(curves);
  all(document, ".player").forEach(player);
}
