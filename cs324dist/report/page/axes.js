"use strict";

// Numbers as charts.py writes them.
const number = (v) => {
  const short = () => {
    if (Math.abs(v) >= 1e7) return v.toExponential(2).replace(/\.?0*e\+/, "e");
    if (Number.isInteger(v) || Math.abs(v) >= 1000) return Math.round(v).toLocaleString("en").replace(/,/g, "\u202f");
    return String(+v.toPrecision(3));
  };
  return short().replace("-", "\u2212");
};
const formatted = (v, unit) => {
  if (unit !== "%") return number(v);
  const percent = +(100 * v).toPrecision(8);
  return `${percent > 99 && percent < 100 ? Math.floor(percent * 100) / 100 : +percent.toFixed(1)}\u00a0%`;
};

// Round numbers on an axis.
function ticks([low, high], about = 5) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.99);
  const first = Math.ceil(low / step), count = Math.min(Math.floor(high / step) - first + 1, 2 * about);
  return Array.from({ length: Math.max(count, 0) }, (_, k) => +((first + k) * step).toPrecision(10));
}

// 1, 2, 5, 10, … on an axis of logarithms; only powers of ten where there are many.
function logTicks([low, high]) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const factor of high - low < 2.5 ? [1, 2, 5] : [1]) found.push(factor * 10 ** power);
  return found.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high).slice(0, 20);
}

// An axis that holds the curves with a little room; a share's goes from 0 to 100 %.
// A curve that is far higher than the others, such as one that diverges, leaves the picture.
function limits(curves, unit) {
  const highest = curves.map((values) => Math.max(...values)).sort((a, b) => a - b);
  const usual = highest[(highest.length - 1) >> 1];
  let low = Math.min(...curves.flat()), high = highest.at(-1);
  if (unit === "" && usual > 0) high = Math.min(high, 4 * usual);
  if (unit === "%" && low >= 0 && high <= 1) return [-0.03, 1.03];
  if (unit !== "log" && low > 0 && low < high / 2) low = 0;
  const room = 0.05 * (high - low) || Math.abs(high) / 2 || 1;
  return [low - room, high + room];
}
