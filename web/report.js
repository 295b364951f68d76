/** The report's numbers as a table: how far pictures and values moved, for what should go and for what should stay. */

import { html } from "./elements.js";

const SECTIONS = [
  ["should change", "realera-moves", { concept: "the concept", synonym: "its aliases", associated: "what goes with it" }],
  ["should stay", "realera-holds", { preserved: "what you preserve", unrelated: "unrelated prompts" }],
];
/** key in the report, heading, its explanation, and what a full bar stands for at least */
const COLUMNS = [
  ["picture_change", "pixels move", "Root mean squared change of pixels at the same seeds; 100% is black to white.", 0],
  ["value_drift", "values move", "How far what the value projections make of the prompts moves, relative to its length.", 1],
  ["embedding_residue", "residue", "How much of the values' way to the anchor's is left: 100% before an edit.", 1],
];

export function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function cell(key, value, most, title) {
  if (value === undefined) return html("td", { class: "realera-number" }, "–");
  const bar = html("span", { class: "realera-bar" });
  bar.style.width = `${Math.min(100, (100 * value) / (most || 1))}%`;
  const told = { class: "realera-number", "data-key": key, "data-value": value, title };
  return html("td", told, percent(value), html("span", { class: "realera-track" }, bar));
}

/** A view of Erasure Report's numbers; see panel.js for what a view is. */
export function reportTable() {
  const element = html("section", { class: "realera-view realera-report" });

  function section(table, columns, most, [aim, kind, groups]) {
    const rows = Object.entries(groups).filter(([group]) => columns.some(([key]) => table[key][group] !== undefined));
    if (!rows.length) return null;
    const body = rows.map(([group, name]) => {
      const labels = (table.probes ?? []).filter((p) => p.group === group).map((p) => p.label).join(", ");
      const head = html("th", { scope: "row", title: labels }, html("span", {}, name), html("small", {}, labels));
      const cells = columns.map(([key, , title]) => cell(key, table[key][group], most[key], title));
      return html("tr", { "data-group": group }, head, ...cells);
    });
    const title = html("tr", { class: "realera-aim" }, html("th", { colspan: columns.length + 1, scope: "rowgroup" }, aim));
    return html("tbody", { class: kind }, title, ...body);
  }

  return {
    element,
    draw() {},
    show(output) {
      const table = output?.realera_report?.[0];
      if (!table) return false;
      const columns = COLUMNS.filter(([key]) => Object.keys(table[key] ?? {}).length);
      const most = Object.fromEntries(columns.map(([key, , , full]) => [key, Math.max(full, ...Object.values(table[key]))]));
      const heads = columns.map(([, name, title]) => html("th", { scope: "col", title }, name));
      const erased = (table.concepts ?? []).map((c) => `${c.concept} → ${c.anchor}`).join(", ");
      element.replaceChildren(
        html("div", { class: "realera-status" }, html("b", {}, erased), html("span", {}, "before and after, same seeds")),
        html("table", {}, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "prompts of"), ...heads)),
          ...SECTIONS.map((s) => section(table, columns, most, s)).filter(Boolean)),
      );
      return true;
    },
  };
}
