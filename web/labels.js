/** Where labels of a map go: beside their points or at the end of a short line, on no other label and off the marks. */

import { textWidth } from "./elements.js";

const DIRECTIONS = [[1, 0], [-1, 0], [0, -1], [0, 1], [0.8, -0.7], [-0.8, -0.7], [0.8, 0.7], [-0.8, 0.7]];
const RINGS = [0, 9, 20, 34];

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

/** Whether a line from a to b runs through a box: it does unless it lies wholly beyond one side (Liang and Barsky). */
function crosses({ x1, y1, x2, y2 }, box) {
  let [enter, leave] = [0, 1];
  const sides = [[x1 - x2, x1 - box.left], [x2 - x1, box.right - x1], [y1 - y2, y1 - box.top], [y2 - y1, box.bottom - y1]];
  for (const [step, room] of sides) {
    if (step === 0 && room < 0) return false;
    if (step < 0) enter = Math.max(enter, room / step);
    if (step > 0) leave = Math.min(leave, room / step);
  }
  return enter < leave;
}

/** The line from a point to its label; none where the label is right beside it. */
function lineTo({ x, y }, box, ring) {
  if (!ring) return null;
  return { x1: x, y1: y, x2: Math.min(Math.max(x, box.left), box.right), y2: Math.min(Math.max(y, box.top), box.bottom) };
}

function contains(outer, inner) {
  return inner.left >= outer.left && inner.right <= outer.right && inner.top >= outer.top && inner.bottom <= outer.bottom;
}

function boxAt(label, [dx, dy], ring) {
  const away = label.radius + 3 + ring;
  const [cx, cy] = [label.x + dx * away, label.y + dy * away];
  const left = dx > 0 ? cx : dx < 0 ? cx - label.width : cx - label.width / 2;
  const top = cy - label.height / 2 + (dx === 0 ? (dy * label.height) / 2 : 0);
  return { left, top, right: left + label.width, bottom: top + label.height };
}

/**
 * Places labels in their order, the first ones best.
 *
 * @param labels [{x, y, radius, text, size, weight, must}]: must keeps a label that finds no free place
 * @param marks [{x, y, radius}] what labels keep off
 * @param bounds {left, top, right, bottom}
 * @returns for each label {box, line} or null where it had to be left out; line leads to a label that is further away
 */
export function placeLabels(labels, marks, bounds) {
  const taken = [];
  const lines = [];
  const solid = marks.map((m) => ({ left: m.x - m.radius, right: m.x + m.radius, top: m.y - m.radius, bottom: m.y + m.radius }));
  return labels.map((given) => {
    const label = { ...given, width: textWidth(given.text, given.size, given.weight) + 2, height: given.size + 2 };
    let best = null;
    for (const ring of RINGS) {
      for (const direction of DIRECTIONS) {
        const box = boxAt(label, direction, ring);
        if (!contains(bounds, box) || taken.some((t) => overlap(t, box)) || lines.some((l) => crosses(l, box))) continue;
        const line = lineTo(label, box, ring);
        if (line && taken.some((t) => crosses(line, t))) continue;
        const covered = solid.filter((s) => overlap(s, box)).length;
        if (!best || covered < best.covered) best = { box, line, covered };
        if (!covered) break;
      }
      if (best && best.covered === 0) break;
    }
    // better on a mark than left out, but not on a heap of them
    if (!best || (best.covered > 2 && !label.must)) return null;
    taken.push(best.box);
    if (best.line) lines.push(best.line);
    return best;
  });
}
