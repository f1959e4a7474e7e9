#!/usr/bin/env python3
"""Spoils the program in one place after the other, and runs the tests that must notice: python3 mutants/run.py [WORD]

It needs Go, takes some minutes, and is no part of CI. With a WORD it takes only the places whose file or tests have it.
"""
import pathlib, shutil, subprocess, sys, tempfile

MUTANTS = [  # file, what is there, what is there instead, tests
    # delivery
    ("connmgr.go", "case old != nil && c.order.before(old.order):", "case false:", "TestDeliveryModel"),
    ("connmgr.go", "c.probes && replaced != c.replaces", "false", "TestDeliveryModel"),
    ("connmgr.go", "delete(m.tokens, token)", "", "TestEveryInterleaving|TestOnDisconnect"),
    ("connmgr.go", "c.suspect.Store(true)", "", "TestDeliveryModel|TestFollower|TestSend"),
    ("connmgr.go", "m.replaced[token] = identifier", "", "TestSweep"),
    ("follower.go", "took && !f.buffered && !f.stopped.Load()", "took && !f.buffered", "TestFollower"),
    ("eventlog.go", "l.visible, l.reason = max(l.visible, n), reason", "l.visible, l.reason = l.last, reason", "TestFollower|TestRest"),
    ("eventlog.go", "return len(l.entries) > 0 && l.loseLocked", "return l.loseLocked", "TestRestoreMemory"),
    ("follower.go", "f.buffered || at.Sub(f.since) < settleTime", "f.buffered", "TestFollower|TestDeliveryModel"),
    ("follower.go", "if f.stopped.Load() {\n\t\tf.ended(", "if false {\n\t\tf.ended(", "TestFollower|TestDeliveryModel"),
    ("follower.go", "for !f.stopped.Load() {", "for {", "TestFollower"),
    ("follower.go", " || end && r.err == nil {", " {", "TestFollower|TestDeliveryModel"),
    ("page.go", "events := s.awaited[id]\n", "events := (*eventLog)(nil)\n", "TestPage"),
    ("version.go", "return f.connect(s.conns, c, func(follow func(*eventLog)) { follow(s.follow(id)) })", "events := s.follow(id)\n\treturn f.connect(s.conns, c, func(follow func(*eventLog)) { follow(events) })", "TestVersionLookedUpConnected"),
    ("version.go", "a.version == seen && a.version != s.Latest()", "(a.version == seen || true) && a.version != s.Latest()", "TestVersionPoll"),
    # tasks
    ("external.go", "t == nil || s.tasks[t.id] != t", "t == nil", "TestReportsOfAnEarlierTask"),
    ("external.go", "r.seq != 0 && r.seq <= t.seq", "false", "TestReports|TestExternal|TestRestoreTasks"),
    ("external.go", "t.deadline.Reset(s.cfg.timeout)", "", "TestExternal|TestReports"),
    ("tasks.go", "if time.Since(t.lastReport) >= s.cfg.timeout {", "if true {", "TestTask|TestExternal"),
    ("tasks.go", "t.number == number {", "number == number {", "TestTask|TestExternal"),
    ("taskapi.go", "t == nil || t.shown.Load() == nil", "t == nil", "TestRestoreShows"),
    # journal
    ("journal.go", "if err := j.file.Sync(); err != nil {", "if false {\n\t\tvar err error", "TestJournal"),
    ("journal.go", "j.cut() // or", "// or", "TestJournalCompaction"),
    ("journal.go", "j.held, j.retry = c, time.After(noRoomPause)", "j.held = c", "TestRestoreNoRoom|TestJournal"),
    ("journal.go", "c.stored.Store(true)", "", "TestJournal"),
    ("journal.go", "c.finish()\n\tj.next.finish()", "c.finish()", "TestJournal|TestRestoreNoRoom"),
    ("journal.go", "j.number, j.held, j.found = c.number, nil, 0", "j.number = c.number", "TestJournal|TestRestoreNoRoom"),
    ("journal.go", "max(j.size.Load(), j.found)", "j.size.Load()", "TestJournalStartsWithoutRoom"),
    ("journal.go", " || j.found > 0", "", "TestJournalStartsWithoutRoom"),
    ("journal.go", "j.zeroes = end + int64(j.ahead)", "j.zeroes = end", "TestJournalWritesAhead"),
    ("journal.go", "_, err := j.file.WriteAt(frames, size)", "err := errCannotStore", "TestJournal"),
    ("journalfile.go", "j.zeroes = end", "j.zeroes = 0", "TestJournalWritesAhead"),
    ("journalfile.go", "torn == begin", "end == begin", "TestJournal"),
    ("compact.go", "j.file, j.dirty, j.zeroes = c.file, false, 0", "j.file, j.dirty = c.file, false", "TestJournal"),
    ("compact.go", "j.disk.remove(j.newPath())", "", "TestJournalCompactionWithoutRoom"),
    ("compact.go", "if c.err == nil {\n\t\tj.copyRest(c)", "if false {\n\t\tj.copyRest(c)", "TestJournalCrashes"),
    ("compact.go", "if err := j.disk.sync(j.dir); err != nil {", "if err := error(nil); err != nil {", "TestJournalCrashes"),
    ("journalfile.go", "ended && commit == j.next.number", "commit == j.next.number", "TestJournal"),
    ("journalfile.go", "commit == j.number ||", "", "TestJournalCrashes"),
    ("journalfile.go", "f.err = err", "", "TestJournalUnreadable"),
    ("journalfile.go", "seal(commit[last:])", "", "TestJournal"),
    ("restore.go", "if !known {", "if !known && false {", "TestSnapshotForgets"),
    ("restore.go", "t == nil || head[1] <= t.lastEvent", "t == nil", "TestRestoreSnapshot"),
    ("restore.go", "if rec.Event > st.events.stats().last {", "if true {", "TestRestoreSnapshot"),
    # gateway
    ("stream.go", "return min(s.cfg.WriteTimeout, overflowTimeout)", "return s.cfg.WriteTimeout", "Overflow|Buffer|Slow"),
    ("stream.go", "|| s.state == streamOverflowed {", "{", "Overflow"),
    ("stream.go", "len(s.pending) == 0: //", "false: //", "Overflow|Buffer|Slow"),
    ("stream.go", "stuck || !errors.Is(err, os.ErrDeadlineExceeded)", "stuck || !errors.Is(err, os.ErrDeadlineExceeded) || true", "Slow|Stream|Write"),
    ("stream.go", "tcp.SetLinger(0)", "_ = tcp", "Slow|Stream|Write|Linger|Memory"),
    ("send.go", "b.events == 0 || len(*b.buf)+maxGrowth*size", "b.events == 0 || len(*b.buf)+size", "Batch"),
    ("send.go", "b.s.token != string(m.token) ||", "", "Batch"),
    ("ask.go", "|| hasLeft(r) {", "{", "Left|Connect|Sidecar"),
    ("refuse.go", "if g.held.Add(1) > maxHeld {", "if g.held.Add(1) > maxHeld && false {", "Refus|Held|Hold"),
    ("refuse.go", 'case "cross-site", "same-site":', 'case "cross-site":', "Foreign|Cross|Site|CORS"),
    ("sidecar.go", "if g.life.Err() != nil { //", "if false { //", "Shutdown|Closing|Stop|Sidecar"),
    ("gateway.go", "err = c.tryReset(ctx, sendLimit,", "err = c.tryReset(ctx, resetLimit,", "Reset"),
    ("gateway.go", "heard && !f.known {", "heard && !f.known && false {", "Reset"),
    ("gateway.go", "c.posting--", "", "Gateway"),
    ("gateway.go", "case status == http.StatusOK && !anyWords:", "case false:", "GatewayClientAnswers"),
    ("http.go", "return errBrokenOff", "return errNotJSON", "SendBrokenOff"),
    ("callback.go", "a.Close = a.Close || h.closing.Load()", "_ = 0", "Callback|Closing"),
    ("postloop.go", 'strings.EqualFold(string(value), "keep-alive")', 'true', "SendConnection"),
    ("postloop.go", "ok = err == nil && length < 0", "ok = err == nil", "SendConnection"),
    ("postloop.go", "ok = p.host == nil && ", "ok = ", "Connection|FuzzPlain"),
    ("postloop.go", "l.busy.Add(1)\n", "\n", "PlainPosts"),
    ("postloop.go", "l.busy.Add(1) //", "l.busy.Add(0) //", "PlainPostsGoBack"),
    ("postloop.go", "buf[0] == '\\r' || buf[0] == '\\n'", "false", "SendConnection"),
    ("postloop.go", "|| p.head > maxHeader ", "", "SendConnection"),
    ("postloop.go", "(err != io.EOF || len(buf) == 0)", "true", "SendConnection"),
    ("postloop.go", "if deadline.Sub(now) < postIdle-postIdleSlack {", "if deadline.IsZero() {", "PlainPosts|SendConnection"),
    ("postloop.go", "postKept/int(l.open.Load())", "postKept", "SendBuffer"),
    ("postloop.go", "l.poster.plainLimit(p) >= 0", "(l.poster.plainLimit(p) >= 0 || true)", "PlainPosts"),
    ("postloop.go", "\t\tc.Close()\n", "\t\t_ = c\n", "PlainPosts"),
    ("postloop.go", "(back == nil || back.plain.Add(1) > 10)", "(back == nil || true)", "PlainPosts"),
    ("postloop.go", " && r.RequestURI == r.URL.Path", "", "PlainOnBothSides"),
    ("send.go", " || g.life.Err() != nil", "", "SendConnections"),
    ("sidecar.go", "g.posts.wait(ctx)", "", "SendConnections"),
    ("backend.go", "b.reports.wait(drain)", "", "ReportConnections"),
    ("client.go", '"[::1]:" + port', '"127.0.0.1:" + port', "Dial|Localhost"),
    ("config.go", 'host == "localhost" || ip.IsLoopback() ||', 'host == "localhost" ||', "TestDevelopment"),
]


def main():
    here = pathlib.Path(__file__).resolve().parent.parent
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = 0
    with tempfile.TemporaryDirectory() as top:
        tree = pathlib.Path(top) / "tree"
        shutil.copytree(here, tree, ignore=shutil.ignore_patterns(".git"))
        for file, old, new, tests in MUTANTS:
            if word not in file + tests:
                continue
            path = tree / file
            good = path.read_text()
            if good.count(old) != 1:
                sys.exit(f"{file} has {old!r} {good.count(old)} times, want once")
            path.write_text(good.replace(old, new))
            command = ["go", "test", "-vet=off", "-failfast", "-timeout", "120s", "-run", tests, "."]
            run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            path.write_text(good)
            if "build failed" in run.stdout:
                sys.exit(f"{file}: {old!r} does not build\n{run.stdout}{run.stderr}")
            failed = [line.split()[2] for line in run.stdout.splitlines() if line.startswith("--- FAIL")]
            killed = run.returncode != 0
            survivors += not killed
            print("killed by" if killed else "SURVIVES", ", ".join(failed) or ("a hang or panic" if killed else ""), "|", file, repr(old), flush=True)
    sys.exit(survivors > 0)


main()
