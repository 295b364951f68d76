/** What a node says in words about an edit, set so that it reads: facts in lines, numbers in a column. */

import { html } from "./elements.js";

/** One line of a report: "  9.3% for the concept" as a row of numbers, "name: words" with its name in bold. */
function line(text) {
  const share = text.match(/^\s+([\d.]+%) for (.+)$/);
  if (share) return html("div", { class: "realera-share" }, html("span", {}, share[1]), html("span", {}, share[2]));
  const named = text.match(/^([^:]{1,60}):\s*(.*)$/);
  if (named) return html("div", {}, html("b", {}, named[1]), ` ${named[2]}`);
  return html("div", {}, text);
}

/** A view of a node's text; see panel.js for what a view is. */
export function textBlock() {
  const element = html("section", { class: "realera-view realera-text" });
  return {
    element,
    draw() {},
    show(output) {
      const text = (output?.text ?? []).join("\n");
      if (!text.trim()) return false;
      element.replaceChildren(...text.split("\n").filter((l) => l.trim()).map(line));
      return true;
    },
  };
}
