/**
 * The other reconciler: discovery as the dashboard's server does it, again and again, for
 * tests. `node discovery.cjs <sessions folder>`; each line on its standard input is answered
 * by what a pass finds, as a JSON list of session ids.
 *
 * Its habits are those that a reconciler has to live with. A process is judged by its bare
 * pid, and files are unlinked by name. One thing is this test's own: before a signal it makes
 * sure that the pid is a keeper of that session, so that no recycled number is hit.
 */
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");

const PAUSE_MS = 3;
const PID_FILE = ".rpc.sock.pid";
const folder = process.argv[2];

function pidIn(file) {
  try {
    const pid = Number.parseInt(fs.readFileSync(file, "utf8"), 10);
    return pid > 0 ? pid : undefined;
  } catch {
    return undefined;
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false; // Habit: EPERM counts as dead.
  }
}

function endKeeper(pid, sid) {
  try {
    const isKeeper = fs.readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").includes(sid);
    if (isKeeper) process.kill(pid, "SIGTERM");
  } catch {
    // it is gone
  }
}

function forget(sid) {
  for (const ending of [PID_FILE, ".rpc.sock"]) {
    fs.rmSync(path.join(folder, sid + ending), { force: true });
  }
}

/** One pass: dead keepers are forgotten, keepers of dead agents ended, the rest is listed. */
function discover() {
  const names = fs.readdirSync(folder).filter((name) => name.endsWith(PID_FILE));
  const listed = [];
  for (const sid of names.map((name) => name.slice(0, -PID_FILE.length))) {
    const keeper = pidIn(path.join(folder, sid + PID_FILE));
    const agent = pidIn(path.join(folder, `${sid}.rpc.sock.pi-pid`));
    if (keeper === undefined || !isAlive(keeper)) {
      forget(sid); // Habit: a pid file that is just being written says nothing, and is dead.
    } else if (agent !== undefined && !isAlive(agent)) {
      endKeeper(keeper, sid);
      forget(sid);
    } else {
      listed.push(sid);
    }
  }
  return listed;
}

setInterval(discover, PAUSE_MS);
readline.createInterface({ input: process.stdin }).on("line", () => {
  console.log(JSON.stringify(discover()));
});
