// Drawings of one flight on canvases. Lengths come in cm and are drawn in m; x forward, y right, z up.

const INK = "#1f2328", SOFT = "#8c959f", LINE = "#e4e8ec", FLOWN = "#0969da", PLANNED = "#bc4c00";
const STAGES = [["queue", "#8c959f"], ["decode", "#54aeff"], ["infer", "#8250df"], ["rest", "#d1d9e0"]];

/** Context of a canvas whose pixels are those of the screen, cleared; sizes are in CSS pixels. */
function paper(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, sans-serif";
  context.lineJoin = "round";
  return { context, width, height };
}

function metres(points) {
  return points.map(([x, y, z, yaw]) => [x / 100, y / 100, z / 100, yaw]);
}

/** The smallest step of 1, 2 or 5 times a power of ten of which at most `most` fit into `span`. */
function gridStep(span, most) {
  const raw = Math.max(span, 1e-6) / most, power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw);
}

function bounds(points) {
  const low = [0, 1, 2].map((axis) => Math.min(...points.map((point) => point[axis])));
  const high = [0, 1, 2].map((axis) => Math.max(...points.map((point) => point[axis])));
  return { low, high, middle: low.map((value, axis) => (value + high[axis]) / 2) };
}

function polyline(context, pixels, colour, width, dash) {
  context.beginPath();
  pixels.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.setLineDash(dash || []);
  context.stroke();
  context.setLineDash([]);
}

function dot(context, [x, y], colour, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = colour;
  context.fill();
}

/** Flown path, planned segment and the drone, from above: forward is up, right is right. */
export function drawAbove(canvas, flight) {
  const { context, width, height } = paper(canvas);
  const path = metres(flight.path), plan = metres(flight.plan), all = [...path, ...plan];
  if (!all.length) return;
  const { low, high, middle } = bounds(all);
  const span = Math.max(2, (high[0] - low[0]) * 1.25, ((high[1] - low[1]) * 1.25 * height) / width);
  const scale = height / span;
  const at = ([x, y]) => [width / 2 + (y - middle[1]) * scale, height / 2 - (x - middle[0]) * scale];
  const step = gridStep(span, 6);
  context.fillStyle = SOFT;
  for (let x = Math.ceil((middle[0] - span / 2) / step) * step; x < middle[0] + span / 2; x += step) {
    polyline(context, [[0, at([x, 0])[1]], [width, at([x, 0])[1]]], LINE, 1);
    context.fillText(`${+x.toFixed(6)}`, 3, at([x, 0])[1] - 3);
  }
  const side = (span * width) / height;
  for (let y = Math.ceil((middle[1] - side / 2) / step) * step; y < middle[1] + side / 2; y += step) {
    polyline(context, [[at([0, y])[0], 0], [at([0, y])[0], height]], LINE, 1);
    context.fillText(`${+y.toFixed(6)}`, at([0, y])[0] + 3, height - 4);
  }
  polyline(context, plan.map(at), PLANNED, 2, [5, 4]);
  polyline(context, path.map(at), FLOWN, 2.5);
  const here = path[path.length - 1] || plan[0], [x, y] = at(here), heading = (here[3] * Math.PI) / 180;
  context.save();
  context.translate(x, y);
  context.rotate(heading);
  context.beginPath();
  context.moveTo(0, -11);
  context.lineTo(7, 8);
  context.lineTo(0, 4);
  context.lineTo(-7, 8);
  context.closePath();
  context.fillStyle = INK;
  context.fill();
  context.restore();
}

/** The same in space, seen from `turn` (radians) around the vertical; shadows on the ground show the height. */
export function drawPath3d(canvas, flight, turn, tilt) {
  const { context, width, height } = paper(canvas);
  const path = metres(flight.path), plan = metres(flight.plan), all = [...path, ...plan];
  if (!all.length) return;
  const { low, high, middle } = bounds(all);
  const radius = Math.max(1.5, Math.hypot(high[0] - low[0], high[1] - low[1], high[2] - low[2]) / 2);
  const ground = low[2] - radius * 0.35, scale = Math.min(width, height) / (2.7 * radius);
  const cos = Math.cos(turn), sin = Math.sin(turn), rise = Math.sin(tilt), flat = Math.cos(tilt);
  const at = ([x, y, z]) => {
    const dx = x - middle[0], dy = y - middle[1], dz = z - middle[2];
    const right = dy * cos - dx * sin, away = dx * cos + dy * sin;
    return [width / 2 + right * scale, height / 2 - (dz * flat + away * rise) * scale];
  };
  const step = gridStep(2 * radius, 6), reach = Math.ceil((radius * 1.2) / step) * step;
  const snap = (value) => Math.round(value / step) * step;
  for (let along = -reach; along <= reach + 1e-9; along += step) {
    const x = snap(middle[0]) + along, y = snap(middle[1]) + along;
    polyline(context, [at([x, snap(middle[1]) - reach, ground]), at([x, snap(middle[1]) + reach, ground])], LINE, 1);
    polyline(context, [at([snap(middle[0]) - reach, y, ground]), at([snap(middle[0]) + reach, y, ground])], LINE, 1);
  }
  polyline(context, path.map(([x, y]) => at([x, y, ground])), "#d1d9e0", 2);
  polyline(context, plan.map(at), PLANNED, 2, [5, 4]);
  polyline(context, path.map(at), FLOWN, 2.5);
  const here = path[path.length - 1] || plan[0];
  polyline(context, [at(here), at([here[0], here[1], ground])], SOFT, 1, [2, 3]);
  dot(context, at(here), INK, 5);
  context.fillStyle = SOFT;
  context.fillText(`${(here[2] - path[0][2]).toFixed(1).replace("-0.0", "0.0")} m above the start; grid ${+step.toFixed(6)} m`, 6, height - 8);
}

/** One stacked bar per segment: queue, decode, model, rest. */
export function drawLatency(canvas, flight) {
  const { context, width, height } = paper(canvas);
  const times = flight.times;
  if (!times.length) return;
  const most = Math.max(...times.map((each) => each.total), 1), step = gridStep(most, 4), top = height - 26;
  const up = (ms) => (ms / (most * 1.08)) * top;
  context.fillStyle = SOFT;
  for (let ms = 0; ms <= most * 1.08; ms += step) {
    polyline(context, [[34, top - up(ms) + 8], [width, top - up(ms) + 8]], LINE, 1);
    context.fillText(`${+ms.toFixed(3)}`, 2, top - up(ms) + 12);
  }
  const slot = (width - 40) / Math.max(times.length, 12), bar = Math.max(2, Math.min(28, slot * 0.7));
  times.forEach((each, index) => {
    const rest = Math.max(0, each.total - each.queue - each.decode - each.infer);
    let base = top + 8;
    for (const [stage, colour] of STAGES) {
      const tall = up(stage === "rest" ? rest : each[stage]);
      context.fillStyle = colour;
      context.fillRect(38 + index * slot, base - tall, bar, tall);
      base -= tall;
    }
    if (slot > 16) {
      context.fillStyle = SOFT;
      context.fillText(`${each.segment}`, 38 + index * slot, height - 4);
    }
  });
}
