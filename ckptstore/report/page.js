// What a report does in the browser: sections with their charts, tables that sort, light and dark.
// Text from a store is never made into markup here: charts draw it, tables have it from the start.
"use strict";
(() => {
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const stored = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
                   set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a file may have none */ } } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";

  // ---- charts
  const views = new Map();
  const style = () => {
    const css = getComputedStyle(root);
    const ink = css.getPropertyValue("--ink").trim(), faint = css.getPropertyValue("--line").trim();
    return {
      background: null, font: css.getPropertyValue("--font").trim(),
      axis: { labelColor: ink, titleColor: ink, gridColor: faint, domainColor: faint, tickColor: faint, titleFontWeight: 500 },
      legend: { labelColor: ink, titleColor: ink }, header: { labelColor: ink, titleColor: ink, labelFontWeight: 600 },
      view: { stroke: null },
    };
  };
  const rowsOf = ({ rows, columns, values }) => rows.flatMap((row, i) => columns.map((column, j) => (
    { row, column, value: values[i][j] })));
  const draw = async (box) => {
    box.dataset.begun = "yes";
    const { spec, cells } = charts[box.dataset.chart];
    const full = { ...spec, autosize: { type: spec.facet ? "pad" : "fit-x", contains: "padding" } };
    if (cells) full.data = { name: "rows", values: rowsOf(cells) };
    if (spec.facet) {
      const { facet, columns, resolve, data, ...inner } = full;
      delete inner.autosize;
      const wide = box.clientWidth > 760;
      inner.width = Math.max(180, (box.clientWidth - (wide ? 160 : 90)) / (wide ? 2 : 1));
      Object.assign(full, { facet, columns: wide ? columns : 1, resolve, data, spec: inner });
      for (const key of ["mark", "encoding", "width", "height"]) delete full[key];
    }
    views.get(box)?.finalize();
    try {
      views.set(box, await ckptstoreEmbed(box, full, { actions: false, ast: true, renderer: "svg", mode: "vega-lite", logLevel: 1,
                                                       config: style() }));
      box.dataset.drawn = "yes";
    } catch (error) {
      box.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  };
  // Those of a section that is not shown have no width; they are drawn anew when it is.
  const redraw = () => {
    for (const box of views.keys()) if (box.closest("section").hidden) delete box.dataset.begun; else draw(box);
  };

  // ---- light and dark
  const toggle = document.getElementById("theme");
  const label = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  if (stored.get("ckptstore-theme")) root.dataset.theme = stored.get("ckptstore-theme");
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored.set("ckptstore-theme", root.dataset.theme);
    label(); redraw();
  });
  dark.addEventListener("change", () => { label(); redraw(); });
  label();

  // ---- one run at a time
  const sections = [...document.querySelectorAll("main > section")];
  const links = [...document.querySelectorAll("nav a")];
  const show = () => {
    const wanted = sections.find((each) => `#${each.id}` === location.hash) || sections[0];
    for (const each of sections) each.hidden = each !== wanted;
    for (const box of wanted.querySelectorAll("[data-chart]:not([data-begun])")) draw(box);
    for (const link of links) {
      if (link.hash === `#${wanted.id}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
  };
  addEventListener("hashchange", () => { show(); scrollTo(0, 0); });
  show();
  addEventListener("load", () => { if (location.hash) scrollTo(0, 0); });

  // ---- tables that sort
  const value = (row, column) => {
    const cell = row.cells[column], given = cell.dataset.value;
    return given === undefined ? cell.textContent : given === "" ? -Infinity : Number(given);
  };
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.parentElement, table = heading.closest("table"), body = table.tBodies[0];
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const column = heading.cellIndex, sign = down ? -1 : 1;
      const rows = [...body.rows].map((row, index) => [value(row, column), index, row]);
      rows.sort((a, b) => sign * order(a[0], b[0]) || a[1] - b[1]);
      body.append(...rows.map(([, , row]) => row));
    });
  }

  // ---- live: ask whether anything was saved, and load the page again
  const live = document.body.dataset.live;
  if (live) {
    const status = document.getElementById("live");
    const ask = async () => {
      try {
        const answer = await fetch("state", { cache: "no-store" });
        if (!answer.ok) throw new Error(`status ${answer.status}`);
        const state = await answer.text();
        if (state !== live) { location.reload(); return; }
        status.textContent = "live";
      } catch { status.textContent = "the server does not answer"; }
      setTimeout(ask, 3000);
    };
    setTimeout(ask, 3000);
  }
})();
