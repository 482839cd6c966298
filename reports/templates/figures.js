// Values of a figure's points under the pointer or by arrow keys, as a table, and the figure as a file.
const startFigures = (data, ratios) => {
  const words = (i) => {
    const r = data.records[i];
    const lines = [`${data.configurations[data.configuration[i]]}${r.is_baseline ? " (baseline)" : ""}`];
    lines.push(`${tokens(r.seq_len)} tokens, ${r.num_devices} devices, ${r.kind}`);
    if (r.status !== "ok") return [...lines, `${r.status}: ${r.reason}`];
    const speed = data.derived.tokens_per_s[i];
    const bounds = r.interval_s ? ` (${number((speed * r.step_s) / r.interval_s[1])}–${number((speed * r.step_s) / r.interval_s[0])})` : "";
    lines.push(`${number(speed)} tokens/s${bounds}`, `step ${seconds(r.step_s)}`);
    const ratio = ratios.ratio(i);
    if (ratio !== null) lines.push(`${ratio.toFixed(2)} × ${ratios.name() ?? "the baseline"}`);
    if (data.derived.peak_memory_bytes[i]) lines.push(`memory ${inBytes(data.derived.peak_memory_bytes[i])}`);
    if (data.derived.bytes_sent[i]) lines.push(`sends ${inBytes(data.derived.bytes_sent[i])}`);
    const waits = data.derived.exposed_s[i];
    if (waits !== null) lines.push(`waits for communication ${seconds(waits)}, ${number((100 * waits) / r.step_s)} %`);
    const parts = Object.entries(r.breakdown).filter(([, value]) => value > 0).map(([name, value]) => `${name} ${seconds(value)}`);
    if (parts.length) lines.push(parts.join(", "));
    return lines;
  };

  for (const figure of document.querySelectorAll("figure[data-marks]")) {
    const marks = figure.dataset.marks.split(" ").filter(Boolean).map((mark) => mark.split(",").map(Number));
    const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
    const name = figure.querySelector("figcaption").textContent;
    if (marks.length) {
      const tip = make("div", { class: "tip", hidden: true });
      const ring = make("div", { class: "ring", hidden: true });
      const spoken = make("div", { class: "unseen", "aria-live": "polite" });
      plot.append(ring, tip, spoken);
      plot.tabIndex = 0;
      plot.setAttribute("role", "group");
      plot.setAttribute("aria-label", `${name}. Arrow keys read its ${marks.length} points.`);
      let shown = -1;
      const show = (n, aloud) => {
        shown = n;
        tip.hidden = ring.hidden = n < 0;
        if (n < 0) return;
        const [x, y, i] = marks[n], box = svg.viewBox.baseVal, scale = svg.clientWidth / box.width;
        const lines = words(i);
        tip.replaceChildren(...lines.map((line, l) => make(l ? "div" : "b", {}, line)));
        ring.style.left = `${x * scale}px`;
        ring.style.top = `${y * scale}px`;
        const half = tip.offsetWidth / 2, room = plot.clientWidth;
        tip.style.left = `${Math.max(0, Math.min(room - 2 * half, x * scale - half))}px`;
        const above = y * scale - tip.offsetHeight - 14;
        tip.style.top = `${above > 0 ? above : y * scale + 14}px`;
        if (aloud) spoken.textContent = lines.join("; ");
      };
      plot.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
        const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
        let near = -1, least = 26;
        marks.forEach(([px, py], n) => {
          const distance = Math.hypot(px - x, py - y);
          if (distance < least) [near, least] = [n, distance];
        });
        if (near !== shown) show(near, false);
      });
      plot.addEventListener("pointerleave", () => show(-1));
      plot.addEventListener("blur", () => show(-1));
      plot.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") show(-1);
        if (!by) return;
        event.preventDefault();
        show((Math.max(shown, by < 0 ? 0 : -1) + by + marks.length) % marks.length, true);
      });
    }

    const file = figure.dataset.name;
    const axis = figure.dataset.axis;
    const columns = ["configuration", "tokens", "devices", "status", "tokens/s", "step s", "memory bytes", "bytes sent", "exposed s"];
    const rows = () =>
      marks.map(([, , i]) => {
        const r = data.records[i];
        const names = ["tokens_per_s", "step_s", "peak_memory_bytes", "bytes_sent", "exposed_s"];
        return [data.configurations[data.configuration[i]], r.seq_len, r.num_devices, r.status, ...names.map((n) => data.value(n, i))];
      });
    const picture = () => {
      const copy = svg.cloneNode(true), box = svg.viewBox.baseVal;
      copy.setAttribute("width", box.width);
      copy.setAttribute("height", box.height);
      copy.setAttribute("style", "color:#1c2128;background:#fff;font-family:system-ui,sans-serif");
      return new XMLSerializer().serializeToString(copy).replace(/var\(--[\w-]+,\s*(#\w+)\)/g, "$1");
    };
    const savePng = async () => {
      const image = new Image(), box = svg.viewBox.baseVal;
      image.src = URL.createObjectURL(new Blob([picture()], { type: "image/svg+xml" }));
      await image.decode();
      const canvas = make("canvas", { width: String(2 * box.width), height: String(2 * box.height) });
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      URL.revokeObjectURL(image.src);
      canvas.toBlob((blob) => save(`${file}.png`, "image/png", blob));
    };
    const more = make("details", { class: "values" }, make("summary", {}, "Values and files"));
    more.addEventListener("toggle", () => {
      if (!more.open || more.children.length > 1) return;
      const button = (label, act) => make("button", { type: "button", onclick: act }, label);
      const buttons = make(
        "p",
        {},
        button("SVG", () => save(`${file}.svg`, "image/svg+xml", picture())),
        button("PNG", savePng),
        button("CSV", () => save(`${file}.csv`, "text/csv", data.csvText([columns, ...rows()]))),
      );
      const line = (cells, tag) => make("tr", {}, ...cells.map((c) => make(tag, tag === "th" ? { scope: "col" } : {}, typeof c !== "number" ? String(c ?? "–") : Number.isInteger(c) ? tokens(c) : number(c))));
      const table = make("table", { "aria-label": `${name}: values` }, make("thead", {}, line(columns, "th")), make("tbody", {}, ...rows().map((r) => line(r, "td"))));
      more.append(buttons, make("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `${name}: values` }, table));
    });
    figure.append(more);
  }
};
