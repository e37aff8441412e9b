"use strict";
// The page's own script. Text of the data set goes into text nodes alone, or through `plain` into a picture's labels.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const $ = (id) => document.getElementById(id);
  const names = { rank_surprisal_ratio: "RSR", mean_rank: "mean rank", mean_surprisal: "mean surprisal (nats)" };
  const nice = (name) => names[name] || name.replaceAll("_", " ");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  // Plotly reads labels as a small kind of HTML
  const plain = (text, limit = 40) => {
    const cut = text.length > limit ? text.slice(0, limit - 1) + "…" : text;
    return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  };
  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const teacherName = (code) => data.teachers[code] ?? "all";
  const wide = () => innerWidth >= 700; // on a phone the filters' chips are the legend
  const palette = 8;
  const colour = (code) => style(`--t${code % palette}`);
  const numTeachers = Math.max(data.teachers.length, 1);
  const state = { off: new Set(), domain: "", correct: "", chosen: "", flag: "", find: "", sort: null, down: false, at: -1 };

  // what can be found by text: ids, prompts, teachers, reasons, and the text of the traces that this page holds
  const textOf = new Map();
  for (const prompt of data.traces)
    for (const item of prompt.items) textOf.set(item.sample, `${prompt.prompt}\n${item.tokens.join("")}`.toLowerCase());
  const haystack = points.sample.map((sample, row) =>
    [`#${sample}`, points.group[row] ?? "", teacherName(points.teacher[row]), points.reason[row]].join("\n").toLowerCase());
  const found = (row) => {
    if (state.find === "") return true;
    if (/^#?\d+$/.test(state.find) && Number(state.find.replace("#", "")) === points.sample[row]) return true;
    return haystack[row].includes(state.find) || (textOf.get(points.sample[row]) ?? "").includes(state.find);
  };
  const flagged = (row) => state.flag === "" || (points.flags[row] >> Number(state.flag)) & 1;

  const visible = (row) =>
    found(row) && flagged(row) &&
    !state.off.has(points.teacher[row]) &&
    (state.domain === "" || points.domain[row] === Number(state.domain)) &&
    (state.correct === "" || points.correct[row] === Number(state.correct)) &&
    (state.chosen === "" || points.chosen[row] === Number(state.chosen));
  const rows = () => points.sample.map((_, row) => row).filter(visible);

  // ---- Pictures ----

  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const layout = (extra) => {
    const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), automargin: true };
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 24, b: 48 },
      font: { family: "system-ui, sans-serif", size: 13, color: style("--ink") }, hovermode: "closest",
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink"), size: 12 } },
      legend: { orientation: "h", y: -0.16, x: 0 }, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  };
  const draw = (id, traces, extra) => Plotly.react($(id), traces, layout(extra), config);
  const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.max(0, Math.floor(share * sorted.length)))];
  const span = (values, share = 0.005) => {
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    if (!sorted.length) return [0, 1];
    const [low, high] = [quantile(sorted, share), quantile(sorted, 1 - share)];
    const pad = 0.06 * (high - low || Math.abs(high) || 1);
    return [low - pad, high + pad];
  };
  const label = (row) =>
    `${plain(teacherName(points.teacher[row]))}<br>${points.group.length ? plain(points.group[row]) + ", " : ""}sample ${points.sample[row]}`;

  function plane() {
    if (!data.ratio) return;
    $("plane").hidden = false;
    const [rank, surprisal] = data.ratio.map((name) => points.scores[name]);
    const [x0, x1] = span(surprisal), [y0, y1] = span(rank);
    const shown = rows();
    const traces = [];
    const ratios = points.scores[data.metric].filter((value) => value !== null).sort((a, b) => a - b);
    const [low, high] = [quantile(ratios, 0.05), quantile(ratios, 0.95)];
    const lines = [0, 0.25, 0.5, 0.75, 1].map((share) => Number((low * (high / low) ** share).toPrecision(high / low > 1.3 ? 2 : 3)));
    const annotations = [];
    for (const ratio of new Set(lines)) {
      const ends = [Math.max(x0, y0 / ratio), Math.min(x1, y1 / ratio)];
      if (!(ends[0] < ends[1])) continue;
      traces.push({ x: ends, y: ends.map((x) => x * ratio), mode: "lines", hoverinfo: "skip", showlegend: false,
        line: { color: style("--soft"), width: 1, dash: "dot" } });
      annotations.push({ x: ends[1], y: ends[1] * ratio, text: String(ratio), showarrow: false, xanchor: "right", yanchor: "bottom",
        font: { size: 11, color: style("--soft") } });
    }
    if (annotations.length) annotations[annotations.length - 1].text = "RSR " + annotations[annotations.length - 1].text;
    const means = [];
    for (let code = 0; code < numTeachers; code++) {
      const own = shown.filter((row) => points.teacher[row] === code);
      if (!own.length) continue;
      traces.push({ x: own.map((row) => surprisal[row]), y: own.map((row) => rank[row]), mode: "markers", type: "scatter",
        name: plain(teacherName(code)), showlegend: false, marker: { color: colour(code), size: own.length > 200 ? 5 : 7, opacity: own.length > 400 ? 0.35 : 0.55 },
        text: own.map((row) => `${label(row)}<br>RSR ${number(points.scores[data.metric][row])}`),
        hovertemplate: "%{text}<br>surprisal %{x:.3f}, rank %{y:.2f}<extra></extra>" });
      const mean = (values) => own.reduce((sum, row) => sum + values[row], 0) / own.length;
      means.push({ x: [mean(surprisal)], y: [mean(rank)], mode: "markers", type: "scatter", name: plain(teacherName(code)),
        marker: { color: colour(code), size: 15, symbol: "diamond", line: { color: style("--card"), width: 2 } },
        hovertemplate: `<b>${plain(teacherName(code))}</b><br>mean surprisal %{x:.3f}, mean rank %{y:.2f}<extra></extra>` });
    }
    draw("plane-plot", [...traces, ...means], { annotations,
      xaxis: { title: { text: "mean surprisal (nats)" }, range: [x0, x1] },
      yaxis: { title: { text: "mean clipped rank" }, range: [y0, y1] }, showlegend: data.teachers.length > 0 && wide() });
  }

  function distribution() {
    $("distribution").hidden = false;
    const column = $("column").value;
    const values = points.scores[column] || points.tokens;
    const shown = rows();
    const traces = [];
    for (let code = numTeachers - 1; code >= 0; code--) {
      const own = shown.filter((row) => points.teacher[row] === code);
      if (!own.length) continue;
      traces.push({ type: "box", orientation: "h", x: own.map((row) => values[row]), name: plain(teacherName(code), wide() ? 34 : 14),
        boxpoints: own.length > 800 ? "outliers" : "all", jitter: 0.6, pointpos: 0, marker: { color: colour(code), size: 3.5, opacity: 0.4 },
        line: { width: 1.5 }, fillcolor: "rgba(128,128,128,0.08)", text: own.map(label), hovertemplate: "%{text}<br>%{x:.3f}<extra></extra>", hoveron: "points" });
    }
    $("distribution-plot").style.height = `${Math.max(260, 70 + 58 * traces.length)}px`;
    draw("distribution-plot", traces, { xaxis: { title: { text: plain(nice(column)) }, range: span(shown.map((row) => values[row])) }, showlegend: false });
  }

  function drift() {
    if (!data.passes) return;
    $("drift").hidden = false;
    const lines = data.passes.teachers.flatMap((y, code) => state.off.has(code) ? [] : [{ x: data.passes.epochs, y, mode: "lines+markers",
      name: plain(teacherName(code), 24), line: { color: colour(code), width: 2 }, hovertemplate: `${plain(teacherName(code))}<br>pass %{x}: %{y:.3f}<extra></extra>` }]);
    draw("drift-plot", lines, { xaxis: { title: { text: "pass (before epoch)" }, dtick: 1 }, yaxis: { title: { text: plain(nice(data.metric)) } }, showlegend: false });
    const shown = rows();
    const map = [];
    for (let code = 0; code < numTeachers; code++) {
      const own = shown.filter((row) => points.teacher[row] === code);
      map.push({ x: own.map((row) => data.passes.spread[row]), y: own.map((row) => data.passes.mean[row]), mode: "markers", showlegend: false,
        marker: { color: colour(code), size: 6, opacity: 0.6 }, text: own.map(label), hovertemplate: "%{text}<br>mean %{y:.3f}, varies by %{x:.3f}<extra></extra>" });
    }
    draw("map-plot", map, { xaxis: { title: { text: "variability over passes" }, rangemode: "tozero" }, yaxis: { title: { text: `mean ${plain(nice(data.metric))}` } } });
  }

  function run() {
    const told = data.progress;
    if (!told) return;
    $("run").hidden = false;
    const x = told.epochs;
    const epoch = { tickprefix: x.length > 6 ? "" : "epoch ", dtick: x.length > 12 ? undefined : 1 };
    const below = { orientation: "h", y: -0.12, x: 0 };
    const line = (name, y, more) => ({ x, y, name: plain(name, 24), mode: "lines+markers", connectgaps: true, ...more });
    const mean = plain(nice(told.metric));
    draw("means-plot", [line("candidates", told.candidates, { line: { color: style("--soft"), dash: "dot" } }),
      line("chosen", told.chosen, { line: { color: style("--accent"), width: 3 } })],
      { xaxis: epoch, yaxis: { title: { text: `mean ${mean}` } }, legend: below, title: { text: "Candidates and plan", font: { size: 13 } } });
    draw("curves-plot", told.curves.map((curve) => line(`sample ${curve.sample}`, curve.values, { mode: "lines", opacity: 0.5, line: { color: colour(curve.teacher), width: 1.5 } })),
      { xaxis: epoch, yaxis: { title: { text: mean } }, showlegend: false, title: { text: "Single responses", font: { size: 13 } } });
    const totals = told.shares.map((counts) => (counts ? counts.reduce((a, b) => a + b, 0) : 0));
    draw("shares-plot", (told.shares.length ? told.teachers : []).map((name, code) => ({ type: "bar", x, name: plain(name, 24), marker: { color: colour(code) },
      y: told.shares.map((counts, place) => (totals[place] ? (100 * counts[code]) / totals[place] : null)) })),
      { barmode: "stack", xaxis: epoch, yaxis: { ticksuffix: " %", range: [0, 100] }, showlegend: false, title: { text: "Teachers in the plan", font: { size: 13 } } });
    const age = (kind) => told.ages.map((ages) => ages?.[kind] ?? null);
    draw("ages-plot", [line("median", age("median"), { line: { color: style("--t6") } }), line("oldest", age("max"), { line: { color: style("--t6"), dash: "dot" } })],
      { xaxis: epoch, yaxis: { title: { text: "optimizer steps" }, rangemode: "tozero" }, legend: below, title: { text: "Age of scores", font: { size: 13 } } });
  }

  function composition() {
    if (!data.composition.length) return;
    $("composition").hidden = false;
    const bars = [...data.composition].reverse();
    const totals = bars.map((bar) => bar.counts.reduce((a, b) => a + b, 0) || 1);
    const traces = data.teachers.map((name, code) => ({ type: "bar", orientation: "h", name: plain(name, 28), y: bars.map((bar) => bar.label),
      x: bars.map((bar, place) => (100 * bar.counts[code]) / totals[place]), marker: { color: colour(code) },
      text: bars.map((bar, place) => (bar.counts[code] / totals[place] >= 0.06 ? `${Math.round((100 * bar.counts[code]) / totals[place])} %` : "")),
      textposition: "inside", insidetextanchor: "middle", textfont: { color: style("--card") }, textangle: 0,
      customdata: bars.map((bar) => bar.counts[code]), hovertemplate: `${plain(name)}<br>%{customdata} samples, %{x:.1f} %<extra></extra>` }));
    $("composition-plot").style.height = `${(wide() ? 150 : 70) + 46 * bars.length}px`;
    draw("composition-plot", traces, { barmode: "stack", bargap: 0.3, xaxis: { ticksuffix: " %", range: [0, 100] }, yaxis: { showgrid: false },
      legend: { orientation: "h", y: -0.32, x: 0, traceorder: "normal" }, showlegend: wide() });
  }

  // ---- Traces ----

  const strength = {
    rank: (rank) => Math.min(Math.log10(Math.max(rank, 1)) / 2, 1),
    surprisal: (nats) => (nats === null ? 1 : Math.min(nats / 8, 1)),
  };
  function paint(node, rank, surprisal, mode) {
    const byRank = 0.62 * strength.rank(rank), bySurprisal = 0.62 * strength.surprisal(surprisal);
    node.style.background = node.style.boxShadow = "";
    if (mode === "rank" || mode === "both") node.style.background = byRank > 0.01 ? `rgba(${style("--rank")},${byRank.toFixed(2)})` : "";
    if (mode === "surprisal") node.style.background = `rgba(${style("--surprisal")},${bySurprisal.toFixed(2)})`;
    if (mode === "both") node.style.boxShadow = `inset 0 -3px 0 rgba(${style("--surprisal")},${Math.min(1.6 * bySurprisal, 1).toFixed(2)})`;
  }
  const mode = () => document.querySelector("input[name=paint]:checked").value;

  function legend() {
    const chosen = mode();
    const scale = (title, values, show) => {
      const line = element("span", title);
      for (const value of values) {
        const swatch = element("i", String(value));
        show(swatch, value);
        line.append(swatch);
      }
      return line;
    };
    const parts = [];
    if (chosen !== "surprisal") parts.push(scale("rank", [1, 3, 10, 30, "100+"], (node, value) => paint(node, parseInt(value, 10), 0, "rank")));
    if (chosen !== "rank") parts.push(scale("surprisal, nats", [0, 2, 4, 6, "8+"], (node, value) => paint(node, 1, parseInt(value, 10), chosen)));
    if (chosen === "both") parts.push(element("span", "A blue line without orange: surprising, yet ranked high. That is what a low ratio rewards."));
    $("legend").replaceChildren(...(chosen === "none" ? [] : parts));
  }

  function trace(item) {
    const article = element("article", undefined, item.chosen ? "chosen" : "");
    const head = element("header");
    const dot = element("span", undefined, `dot t${item.teacher % palette}`);
    const who = element("b");
    who.append(dot, data.teachers.length ? teacherName(item.teacher) : `sample ${item.sample}`);
    head.append(who);
    for (const [name, value] of Object.entries(item.scores)) head.append(element("span", `${nice(name)} ${number(value)}`));
    head.append(element("span", `${item.tokens.length + item.more} tokens`));
    if (item.correct >= 0) head.append(element("span", item.correct ? "✓ correct" : "✗ wrong"));
    if (item.chosen) head.append(element("span", "chosen", "badge"));
    article.append(head);
    if (item.reason) article.append(element("p", item.reason, "why"));
    const text = element("div", undefined, "text");
    text.dir = "auto";
    const how = mode();
    item.tokens.forEach((token, place) => {
      const node = element("bdi", token === "" ? "·" : token);
      node.dataset.place = place;
      paint(node, item.ranks[place], item.surprisals[place], how);
      text.append(node);
    });
    if (item.more) text.append(element("span", `  … ${item.more.toLocaleString("en")} more tokens, not in this page`, "more"));
    const tell = (event) => {
      const node = event.target.closest("bdi");
      for (const other of document.querySelectorAll("bdi.on")) other.classList.remove("on");
      $("tip").hidden = !node;
      if (!node) return;
      const place = Number(node.dataset.place);
      node.classList.add("on");
      $("tip").textContent = `rank ${item.ranks[place].toLocaleString("en")}\nsurprisal ${number(item.surprisals[place])} nats`;
      const box = node.getBoundingClientRect();
      $("tip").style.left = `${Math.max(6, Math.min(box.left, innerWidth - 170))}px`;
      $("tip").style.top = `${box.top > 60 ? box.top - 54 : box.bottom + 6}px`;
    };
    text.addEventListener("pointerover", tell);
    text.addEventListener("click", tell);
    text.addEventListener("pointerleave", () => ($("tip").hidden = true));
    article.append(text);
    return article;
  }

  const shownItems = (prompt) => prompt.items.filter((item) => !state.off.has(item.teacher) && foundItem(prompt, item) &&
    (state.domain === "" || item.domain === Number(state.domain)) &&
    (state.correct === "" || item.correct === Number(state.correct)) && (state.chosen === "" || item.chosen === Number(state.chosen)));

  const foundItem = (prompt, item) => state.find === "" || `#${item.sample}` === state.find || String(item.sample) === state.find ||
    prompt.group.toLowerCase().includes(state.find) || teacherName(item.teacher).toLowerCase().includes(state.find) ||
    textOf.get(item.sample).includes(state.find);

  function browser() {
    if (!data.traces.length) return;
    $("browser").hidden = false;
    const options = [...$("prompt").options];
    for (const option of options) option.hidden = option.disabled = !shownItems(data.traces[option.value]).length;
    if (!$("prompt").value || $("prompt").selectedOptions[0].disabled) $("prompt").value = options.find((option) => !option.disabled)?.value ?? "";
    const prompt = data.traces[$("prompt").value];
    $("prompt-text").hidden = !prompt;
    $("prompt-text").textContent = prompt?.prompt;
    $("traces").replaceChildren(...(prompt ? shownItems(prompt).map(trace) : [element("p", "No response passes the filters.", "note")]));
    legend();
  }

  // ---- The table ----

  // Rows have one height, and only those in sight are in the document.
  const ROW = 34;
  let listed = [];
  let shownColumns = [];
  // the mean log-probability is the mean surprisal with the other sign
  const redundant = (name) => name === "global_naturalness" && data.metrics.includes("mean_surprisal");
  const firstOf = new Map();
  points.group.forEach((group, row) => firstOf.has(group) || firstOf.set(group, row));
  const goodness = (row) => (data.better === "higher" ? -1 : 1) * (points.scores[data.metric][row] ?? Infinity);
  const rivals = (a, b) => firstOf.get(points.group[a]) - firstOf.get(points.group[b]) || goodness(a) - goodness(b);
  function table() {
    $("table").hidden = false;
    const columns = [["sample", (row) => points.sample[row]]];
    if (points.group.length) columns.push(["prompt", (row) => points.group[row]]);
    if (data.teachers.length) columns.push(["teacher", (row) => teacherName(points.teacher[row])]);
    if (data.domains.length) columns.push([data.domain, (row) => data.domains[points.domain[row]]]);
    if (points.tokens.length) columns.push(["tokens", (row) => points.tokens[row]]);
    for (const name of data.metrics) if (!redundant(name)) columns.push([name, (row) => points.scores[name][row]]);
    if (points.correct.some((value) => value >= 0)) columns.push(["correct", (row) => ["", "no", "yes"][points.correct[row] + 1]]);
    if (data.chosen !== null) columns.push(["chosen", (row) => (points.chosen[row] ? "yes" : "no")], ["reason", (row) => points.reason[row]]);
    const head = element("tr");
    columns.forEach(([name, value], place) => {
      const cell = element("th", nice(name) + (state.sort === place ? (state.down ? " ↓" : " ↑") : ""));
      cell.tabIndex = 0;
      const sort = () => {
        state.down = state.sort === place && !state.down;
        state.sort = place;
        table();
      };
      cell.addEventListener("click", sort);
      cell.addEventListener("keydown", (event) => event.key === "Enter" && sort());
      head.append(cell);
    });
    document.querySelector("#rows thead").replaceChildren(head);
    const shown = points.group.length ? rows().sort(rivals) : rows();
    if (state.sort !== null) {
      const value = columns[state.sort][1];
      const order = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
      shown.sort((a, b) => (state.down ? order(b, a) : order(a, b)));
    }
    listed = shown;
    shownColumns = columns;
    const widths = { reason: 44, prompt: 20, teacher: 20, [data.domain]: 14 };
    document.querySelector("#rows colgroup").replaceChildren(...columns.map(([name]) => {
      const column = element("col");
      column.style.width = `${widths[name] ?? Math.max(9, Math.min(nice(name).length + 2, 14))}ch`;
      return column;
    }));
    $("rows").style.minWidth = `${columns.reduce((sum, [name]) => sum + (widths[name] ?? 11), 0)}ch`;
    paintRows();
    $("table-note").textContent = `${listed.length.toLocaleString("en")} responses pass the filters. Click a heading to sort, a row to see why. Keys in the list: ↑ ↓ move, Enter reads the trace. ${data.rule}` +
      (data.traces.length || data.passes ? "" : " Scored with --traces, the file also holds responses token by token, and they can be read here.");
  }

  function gap(height) {
    const line = element("tr", undefined, "gap");
    const cell = element("td");
    cell.colSpan = shownColumns.length;
    cell.style.height = line.style.height = `${height}px`;
    line.append(cell);
    return line;
  }

  function paintRows() {
    const box = $("rows-box");
    const first = Math.max(0, Math.min(Math.floor(box.scrollTop / ROW) - 12, listed.length));
    const last = Math.min(listed.length, first + Math.ceil((box.clientHeight || innerHeight) / ROW) + 24);
    const lines = listed.slice(first, last).map((row, offset) => {
      const line = element("tr", undefined, first + offset === state.at ? "on" : "");
      line.dataset.place = first + offset;
      for (const [name, value] of shownColumns) {
        const what = value(row);
        const fraction = typeof what === "number" && !Number.isInteger(what);
        const cell = element("td", fraction ? number(what) : String(what ?? "–"), name === "reason" ? "reason" : typeof what === "number" ? "number" : "");
        cell.dir = "auto";
        line.append(cell);
      }
      return line;
    });
    if (first > 0) lines.unshift(gap(first * ROW));
    if (last < listed.length) lines.push(gap((listed.length - last) * ROW));
    document.querySelector("#rows tbody").replaceChildren(...lines);
  }

  function point(place) {
    if (!listed.length) return;
    state.at = Math.max(0, Math.min(place, listed.length - 1));
    const box = $("rows-box");
    const top = state.at * ROW, head = document.querySelector("#rows thead").offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top;
    if (top + ROW + head > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW + head - box.clientHeight;
    paintRows();
    const row = listed[state.at];
    $("detail").hidden = false;
    $("detail").textContent = shownColumns.map(([name, value]) => {
      const what = value(row);
      return `${nice(name)}: ${typeof what === "number" && !Number.isInteger(what) ? number(what, 4) : what ?? "–"}`;
    }).join("\n");
  }

  function read(place) {
    const sample = points.sample[listed[place]];
    const prompt = data.traces.findIndex((each) => each.items.some((item) => item.sample === sample));
    if (prompt < 0) return;
    $("prompt").value = String(prompt);
    browser();
    $("browser").scrollIntoView();
  }

  // ---- Filters ----

  const pictures = [plane, distribution, drift, run, composition];
  const parts = [...pictures, browser, table];
  function refresh() {
    state.at = -1;
    $("detail").hidden = true;
    $("count").textContent = `${rows().length.toLocaleString("en")} of ${points.sample.length.toLocaleString("en")} shown`;
    for (const part of parts) part();
  }

  $("filters").hidden = false;
  data.teachers.forEach((name, code) => {
    const chip = element("button");
    chip.type = "button";
    chip.append(element("span", undefined, `dot t${code % palette}`), element("bdi", name));
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      state.off.has(code) ? state.off.delete(code) : state.off.add(code);
      chip.setAttribute("aria-pressed", String(!state.off.has(code)));
      refresh();
    });
    $("teachers").append(chip);
  });
  const choice = (id, wanted) => {
    $(`${id}-label`).hidden = !wanted;
    $(id).addEventListener("change", (event) => {
      state[id] = event.target.value;
      refresh();
    });
  };
  data.domains.forEach((name, code) => {
    const option = element("option", name);
    option.value = String(code);
    $("domain").append(option);
  });
  if (data.domain) document.querySelector("#domain-label span").textContent = data.domain;
  choice("domain", data.domains.length > 1);
  choice("correct", points.correct.some((value) => value >= 0));
  choice("chosen", data.chosen !== null);
  const checks = Object.keys(data.health.checks);
  checks.forEach((name, place) => {
    if (!points.flags.some((bits) => (bits >> place) & 1)) return;
    const option = element("option", name);
    option.value = String(place);
    $("flag").append(option);
  });
  choice("flag", $("flag").options.length > 1);
  let typing = 0;
  $("find").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      state.find = $("find").value.trim().toLowerCase();
      refresh();
    }, 120);
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const name of [data.metric, ...data.metrics.filter((name) => name !== data.metric), ...(points.tokens.length ? ["tokens"] : [])]) {
    const option = element("option", nice(name));
    option.value = name;
    $("column").append(option);
  }
  $("column").addEventListener("change", distribution);
  data.traces.forEach((prompt, place) => {
    const option = element("option", `${prompt.group}: ${prompt.prompt.replace(/\s+/g, " ").slice(0, 60)}`);
    option.value = String(place);
    $("prompt").append(option);
  });
  const step = (by) => () => {
    const open = [...$("prompt").options].filter((option) => !option.disabled).map((option) => option.value);
    if (!open.length) return;
    $("prompt").value = open[(open.indexOf($("prompt").value) + by + open.length) % open.length];
    browser();
  };
  $("prompt").addEventListener("change", browser);
  $("previous").addEventListener("click", step(-1));
  $("next").addEventListener("click", step(1));
  $("paint").addEventListener("change", browser);
  $("rows-box").addEventListener("scroll", paintRows, { passive: true });
  $("rows-box").addEventListener("click", (event) => {
    const line = event.target.closest("tbody tr[data-place]");
    if (line) point(Number(line.dataset.place));
  });
  $("rows-box").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
    if (by) {
      event.preventDefault();
      point(state.at + by);
    } else if (event.key === "Enter" && state.at >= 0 && event.target === $("rows-box")) read(state.at);
  });
  addEventListener("keydown", (event) => {
    const typed = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && typed === $("find")) {
      $("find").value = state.find = "";
      $("find").blur();
      refresh();
    }
    if (typed || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      $("find").focus();
    } else if (event.key === "n") step(1)();
    else if (event.key === "p") step(-1)();
  });
  if ($("live")) {
    let used = 0;
    for (const kind of ["pointerdown", "keydown", "wheel", "input"]) addEventListener(kind, () => (used = Date.now()), { passive: true });
    setInterval(() => document.visibilityState === "visible" && Date.now() - used > 60000 && location.reload(), 20000);
  }
  addEventListener("scroll", () => ($("tip").hidden = true), { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  refresh();
  document.documentElement.dataset.ready = "yes";
})();
