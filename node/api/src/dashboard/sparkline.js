/** Draws a series of the last minutes as a small line on a canvas. */

export const WINDOW_MS = 5 * 60_000;
const INSET = 3;

/** Points are `{time, value}`, oldest first; a value of null is a gap. `floor` is what the lower edge stands for. */
export function drawSparkline(canvas, points, now, floor = 0) {
  const scale = devicePixelRatio;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  }
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const known = points.filter((point) => point.value !== null);
  const top = known.reduce((most, point) => Math.max(most, point.value), floor) - floor || 1;
  const x = (point) => width - INSET - ((now - point.time) / WINDOW_MS) * (width - 2 * INSET);
  const y = (point) => height - INSET - ((point.value - floor) / top) * (height - 2 * INSET);

  context.strokeStyle = style.getPropertyValue("--line");
  context.strokeRect(INSET, height - 0.5, width - 2 * INSET, 0);
  if (known.length === 0) return;
  context.beginPath();
  known.forEach((point) => context.lineTo(x(point), y(point)));
  context.strokeStyle = context.fillStyle = style.color;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  const last = known[known.length - 1];
  context.lineTo(x(last), height);
  context.lineTo(x(known[0]), height);
  context.globalAlpha = 0.12;
  context.fill();
  context.globalAlpha = 1;
  context.beginPath();
  context.arc(x(last), y(last), 2.5, 0, 2 * Math.PI);
  context.fill();
}
