package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// restoreTest runs a story in a bubble, with a backend that begins with an empty folder.
func restoreTest(t *testing.T, settings string, story func(t *testing.T, api *apiFixture)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { story(t, restart(t, settings, nil)) })
}

// restart returns a backend that begins with what the one before has left in its folder, after these changes to it. The
// one before crashes.
func restart(t *testing.T, settings string, before *apiFixture, changes ...func(*apiFixture)) *apiFixture {
	t.Helper()
	dir := t.TempDir()
	if before != nil {
		dir = before.cfg.DataDir
		before.crash()
	}
	api := newAPI(t, settings)
	api.cfg.DataDir = dir
	api.settle = synctest.Wait
	for _, change := range changes {
		change(api)
	}
	must(t, unlocked(func() error { return api.openJournal(t.Context()) }))
	t.Cleanup(api.crash)
	return api
}

// crash closes the journal of a backend. Nothing that the backend does afterwards is stored.
func (api *apiFixture) crash() {
	if api.journal == nil {
		return
	}
	api.journal.close()
	api.tasks.mu.Lock()
	defer api.tasks.mu.Unlock()
	api.journal, api.tasks.journal, api.version.journal = nil, nil, nil
}

// All that was answered is there after a restart, and a task that cannot go on has failed.
func TestRestoreTasks(t *testing.T) {
	const settings = "TASK_MAX_WORKERS=1 TASK_CLEANUP_INTERVAL_SECONDS=100 TASK_TIMEOUT_SECONDS=50"
	restoreTest(t, settings, func(t *testing.T, api *apiFixture) {
		external := func(id string) {
			api.check("POST", "/api/tasks", `{"type":"external","params":{"task_id":"`+id+`","title":"Title of `+id+`"}}`,
				`202 {"status":"running","stream_url":"/api/sse/tasks?task_id=`+id+`","task_id":"`+id+`"}`)
		}
		for id := range strings.FieldsSeq("runs done fails cancelled deleted") {
			external(id)
			api.checkPost(id+"/progress", `{"text":"half","value":0.5,"seq":7}`, `200 {"event_id":"e-2"}`)
		}
		api.checkPost("done/complete", `{"result":{"a": [1, "}"]}}`, `200 {"event_id":"e-3"}`)
		api.checkPost("fails/fail", `{"error":"no luck"}`, `200 {"event_id":"e-3"}`)
		api.post("cancelled/cancel", "")
		api.post("deleted/cancel", "")
		api.do("DELETE", "/api/tasks/deleted", "")
		const sleeps = `{"type":"demo","params":{"steps":1,"delay":60}}`
		running, waiting, ended := api.start(sleeps), api.start(sleeps), api.start(sleeps)
		api.post(ended+"/cancel", "")
		before := map[string]string{}
		for id := range strings.FieldsSeq(ended + " runs done fails cancelled deleted") {
			for _, path := range []string{"/status", "/events", "/events?after=e-1"} {
				before["/api/tasks/"+id+path] = api.do("GET", "/api/tasks/"+id+path, "")
			}
		}

		for range 2 { // the second time from what the first has written
			time.Sleep(20 * time.Second)
			api = restart(t, settings, api)
			for path, want := range before {
				api.check("GET", path, "", want)
			}
		}
		api.checkStatus(running, taskFailed, "interrupted by a restart")
		api.checkStatus(waiting, taskFailed, "interrupted by a restart") // it ran in between
		api.checkPost("runs/progress", `{"text":"half","value":0.5,"seq":7}`, `200 {"event_id":"e-2","repeated":true}`)
		api.checkPost("runs/progress", `{"text":"more","value":0.4,"seq":8}`, `200 {"event_id":"e-3"}`)
		api.checkPost("done/complete", `{"result":{"a":[1,"}"]}}`, `200 {"event_id":"e-3"}`)
		external("deleted")
		for status, want := range map[string]float64{"running": 2, "completed": 1, "failed": 3, "cancelled": 2} {
			api.wantMetric(`tasks{status="`+status+`"}`, want)
		}
		time.Sleep(49 * time.Second)
		if got := api.status("runs"); !strings.Contains(got, `"status":"running","title":"Title of runs","progress":{"text":"more","value":0.5}`) {
			t.Errorf("before its timeout: got %s", got)
		}
		time.Sleep(2 * time.Second)
		api.checkStatus("runs", taskFailed, "worker lost")
		time.Sleep(10 * time.Second) // 101 s after its end
		api.checkGone("done")
	})
}

// makeProgress reports 4,000 bytes this many times.
func (api *apiFixture) makeProgress(id string, times int) {
	for range times {
		api.post(id+"/progress", `{"text":"`+strings.Repeat("x", 4000)+`"}`)
	}
}

// progress returns how many of the reports of makeProgress there still are.
func (api *apiFixture) progress(id string) int {
	return strings.Count(api.do("GET", "/api/tasks/"+id+"/events", ""), "xxxx\"")
}

// Progress that was dropped to save memory comes back with a restart. Even then it displaces no finished task.
func TestRestoreMemory(t *testing.T) {
	restoreTest(t, "TASK_MEMORY_BYTES=300000", func(t *testing.T, api *apiFixture) {
		for id := range strings.FieldsSeq("a b c") {
			api.external(id)
			api.makeProgress(id, 60)
		}
		for id := range strings.FieldsSeq("a b") {
			api.checkPost(id+"/complete", `{"result":1}`, `200 {"event_id":"e-62"}`)
		}
		api = restart(t, "TASK_MEMORY_BYTES=300000", api)
		for id := range strings.FieldsSeq("a b c") {
			if got, n := api.status(id), api.progress(id); !strings.HasPrefix(got, "200 ") || n < 10 {
				t.Errorf("%s: got %s and %d reports, want 10 at least", id, got, n)
			}
		}
		if got := api.tasks.memory.bytes.Load(); got > 300000 {
			t.Errorf("got %d bytes, want 300000 at most", got)
		}
	})
}

// A task that finished long ago takes no room from one that goes on.
func TestRestoreMemoryOfOldTasks(t *testing.T) {
	const settings = "TASK_MEMORY_BYTES=300000 TASK_CLEANUP_INTERVAL_SECONDS=60"
	restoreTest(t, settings, func(t *testing.T, api *apiFixture) {
		api.external("old")
		api.makeProgress("old", 50)
		api.post("old/complete", "{}")
		time.Sleep(2 * time.Minute)
		api.external("new")
		api.makeProgress("new", 50)
		api = restart(t, settings, api)
		if got := api.progress("new"); got != 50 {
			t.Errorf("got %d reports, want 50", got)
		}
		api.checkGone("old")
	})
}

// A task that only waits has no progress to lose.
func TestRestoreMemoryOfWaitingTasks(t *testing.T) {
	restoreTest(t, "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		long := strings.Repeat("x", 8000)
		for range 2 {
			api.start(`{"type":"demo","params":{"delay":60,"message":"` + long + `"}}`)
		}
		for range 20 {
			api.start(`{"type":"external","params":{"title":"` + long + `"}}`)
		}
		api = restart(t, "TASK_MAX_WORKERS=1 TASK_MEMORY_BYTES=65536", api)
		if got := api.do("GET", "/api/tasks", ""); strings.Count(got, `"status":"running"`) < 21 {
			t.Errorf("got %s", got)
		}
	})
}

// restored returns a backend that begins with these records.
func restored(t *testing.T, settings string, records ...string) *apiFixture {
	t.Helper()
	api := newAPI(t, settings)
	api.settle = synctest.Wait
	r := newRestoring(api.tasks, api.version)
	for _, record := range records {
		must(t, r.apply([]byte(record)))
	}
	must(t, r.finish())
	return api
}

// A task that is forgotten while a snapshot is made is not in it, with or without its events.
func TestSnapshotForgets(t *testing.T) {
	restoreTest(t, "TASK_CLEANUP_INTERVAL_SECONDS=60", func(t *testing.T, api *apiFixture) {
		api.external("a", "b")
		api.post("b/complete", "{}")
		api.page("r", "", "b")
		var records []string
		api.journal.snapshot(func(record []byte) {
			if record[0] == recordTask {
				time.Sleep(2 * time.Minute)
			}
			records = append(records, string(record))
		})
		restored(t, "", records...).checkGone("b")
	})
}

// A crash may come between the record of a task and its task_started event, which may be in different commits.
func TestRestoreBeforeTheStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		record := encodeRecord(recordTask, recordFields{Number: 1, ID: "a", Epoch: "e", Kind: externalTask})
		api := restored(t, "", string(record))
		api.checkStatus("a", taskRunning, "")
		api.checkPost("a/progress", `{"text":"x"}`, `200 {"event_id":"e-2"}`)
	})
}

// If the limit drops an event from before a restart, it does not count: somebody was given it, or it was counted then.
func TestRestoreCountsNoDrops(t *testing.T) {
	restoreTest(t, "TASK_EVENT_LIMIT=5", func(t *testing.T, api *apiFixture) {
		api.external("a")
		for range 20 {
			api.post("a/progress", `{"value":0.5}`)
		}
		const dropped = `sse_outbox_dropped_total{service="task",reason="limit"}`
		api.wantMetric(dropped, 16)
		api = restart(t, "TASK_EVENT_LIMIT=5", api)
		api.wantMetric(dropped, 0)
		api.post("a/progress", `{"value":0.6}`)
		api.wantMetric(dropped, 0) // it displaced an event from before the restart
	})
}

// A task that was waiting runs after a restart, even beyond the limit of the queue, or its error says why it cannot.
func TestRestoreWaitingTasks(t *testing.T) {
	restoreTest(t, "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		const sleeps = `{"type":"demo","params":{"steps":1,"delay":60}}`
		for range 3 {
			api.start(sleeps)
		}
		api.start(`{"type":"failing","params":{"error_message":"as it was asked to"}}`)
		api = restart(t, "TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=0", api)
		time.Sleep(200 * time.Second)
		list := api.do("GET", "/api/tasks", "")
		for text, want := range map[string]int{`"error":"interrupted by a restart"`: 1, `"result":{"message":"demo finished","steps":1}`: 2, `"error":"as it was asked to"`: 1} {
			if got := strings.Count(list, text); got != want {
				t.Errorf("%s: %d times in %s, want %d", text, got, list, want)
			}
		}

		api = restart(t, "TASK_MAX_WORKERS=1", api)
		for range 2 {
			api.start(sleeps)
		}
		api = restart(t, "TASK_MAX_WORKERS=1", api, func(api *apiFixture) {
			api.tasks.kinds["demo"] = func(object) (taskFunc, error) { return nil, badParam("steps must be even") }
		})
		if list := api.do("GET", "/api/tasks", ""); !strings.Contains(list, `"error":"steps must be even"`) {
			t.Errorf("a task that can no longer be made: got %s", list)
		}

		for range 2 {
			api.start(`{"type":"failing","params":{"delay":60}}`)
		}
		api = restart(t, "", api, func(api *apiFixture) { api.tasks.kinds = nil }) // a build without these kinds
		list = api.do("GET", "/api/tasks", "")
		for _, text := range []string{`"error":"unknown task type"`, `"error":"interrupted by a restart"`} {
			if got := strings.Count(list, text); got < 1 {
				t.Errorf("kinds that are gone: got %s, want %s", list, text)
			}
		}
	})
}

// After a restart, announcements to one request_id and those to everybody are sent in their order. What was received
// is not sent again.
func TestRestoreVersions(t *testing.T) {
	const settings = "VERSION_PENDING_SECONDS=100"
	restoreTest(t, settings, func(t *testing.T, api *apiFixture) {
		again := func() { api = restart(t, settings, api) }
		for range 2 {
			api.checkAnnounced("away", "v1", false)
			api.checkAnnouncedToAll("v2", 0, 0)
			api.checkAnnounced("away", "v3", false)
			api.checkAnnouncedToAll("v4", 0, 0)
		}
		again()
		wantVersions(t, api, "away", "", "v1 v2 v3 v4 v1 v2 v3 v4")
		wantVersions(t, api, "fresh", "", "v4")
		api.version.tidy() // notes what was received
		again()
		wantVersions(t, api, "away", "e-3", "v4 v1 v2 v3 v4")
		api.checkAnnounced("away", "v5", false)
		api.version.tidy()
		again()
		wantVersions(t, api, "away", "", "v5")
		api.version.tidy()
		time.Sleep(200 * time.Second)
		api.version.tidy()
		again()
		wantVersions(t, api, "away", "", "v4") // all else has expired
	})
}

// A restart from a snapshot gives the same state, even if changes that are in the snapshot follow it again.
func TestRestoreSnapshot(t *testing.T) {
	restoreTest(t, "TASK_EVENT_LIMIT=5", func(t *testing.T, api *apiFixture) {
		for id := range strings.FieldsSeq("a b c") {
			api.start(`{"type":"external","params":{"task_id":"` + id + `","title":"T"}}`)
			for n := range 8 {
				api.post(id+"/progress", fmt.Sprintf(`{"text":"report %d","value":0.%d,"seq":%d}`, n, n, n+1))
			}
		}
		api.post("b/complete", `{"result":[1]}`)
		api.post("c/cancel", "")
		api.do("DELETE", "/api/tasks/c", "")
		api.checkAnnounced("both", "v1", false)
		api.checkAnnounced("received", "v1", false)
		api.checkAnnouncedToAll("v2", 0, 0)
		api.checkAnnounced("new", "v3", false)
		wantVersions(t, api, "received", "", "v1 v2")
		var snapshot []string
		api.journal.snapshot(func(record []byte) { snapshot = append(snapshot, string(record)) })
		api.crash()
		file, err := os.ReadFile(filepath.Join(api.cfg.DataDir, "journal"))
		must(t, err)
		changes, _, err := readJournal(t.TempDir(), file)
		must(t, err)
		for _, records := range [][]string{snapshot, slices.Concat(snapshot, changes)} {
			again := restored(t, "TASK_EVENT_LIMIT=5", records...)
			for id := range strings.FieldsSeq("a b c") {
				for _, path := range []string{"/api/tasks/" + id + "/status", "/api/tasks/" + id + "/events"} {
					again.check("GET", path, "", api.do("GET", path, ""))
				}
			}
			again.checkPost("a/progress", `{"text":"x","seq":8}`, `200 {"event_id":"e-9","repeated":true}`)
			if got := again.version.memory.events.Load(); got != 5 {
				t.Errorf("got %d events, want 5", got)
			}
			wantVersions(t, again, "both", "", "v1 v2")
			wantVersions(t, again, "received", "", "")
			wantVersions(t, again, "new", "", "v2 v3")
			wantVersions(t, again, "fresh", "", "v2")
		}
	})
}

// wantVersions connects a browser, checks which versions it gets, and has it leave.
func wantVersions(t *testing.T, api *apiFixture, id, lastEventID, want string) {
	t.Helper()
	s := api.connect(versionPath(id), lastEventID)
	time.Sleep(2 * time.Second)
	story := "connection_open"
	for version := range strings.FieldsSeq(want) {
		story += " version:" + version
	}
	s.checkStory(story)
	s.leave()
}

// An externalWorker is the worker of an external task. It repeats each report until it is answered.
type externalWorker struct {
	visitor
	id      string
	texts   []string
	doubles bool // its reports have no seq
}

// run reports until ctx ends.
func (r *externalWorker) run(ctx context.Context) {
	for tick := time.Tick(10 * time.Millisecond); ctx.Err() == nil; <-tick {
		text := fmt.Sprintf("report %d on %s", len(r.texts)+1, r.id)
		r.texts = append(r.texts, text)
		seq := fmt.Sprintf(`,"seq":%d`, len(r.texts))
		if r.doubles {
			seq = ""
		}
		r.until(fmt.Sprintf("/api/tasks/%s/progress", r.id), fmt.Sprintf(`{"text":%q%s}`, text, seq))
	}
}

// until posts until the answer is 200. While the backend is away the answer may be 503 or missing; no other is right.
func (r *externalWorker) until(path, body string) {
	for {
		resp, err := r.client.Post(r.api+path, "application/json", strings.NewReader(body))
		if err == nil {
			resp.Body.Close()
			switch resp.StatusCode {
			case http.StatusOK:
				return
			case http.StatusServiceUnavailable: // the backend is stopping
			default:
				r.t.Errorf("%s: got %s", path, resp.Status)
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A backend that is killed or stopped in the middle of its work loses nothing, and neither workers nor browsers notice:
// each report arrives at each follower once and in order, and no EventSource gives up. A report without seq may arrive
// twice if its answer was lost.
//
// SIDECAST_RESTARTS sets the number of restarts, for a longer run.
func TestRestart(t *testing.T) {
	t.Parallel()
	restarts := 3
	if n, err := strconv.Atoi(os.Getenv("SIDECAST_RESTARTS")); err == nil {
		restarts = n
	}
	data := func(t *testing.T) []string {
		return []string{"DATA_DIR=" + t.TempDir(), "RETRY_MILLISECONDS=50", "TASK_EVENT_LIMIT=1000000000"}
	}
	t.Run("embedded", func(t *testing.T) {
		backend := startBackend(t, data(t)...)
		checkRestarts(t, newVisitor(t, backend.URL, backend.URL), backend, restarts)
	})
	t.Run("split", func(t *testing.T) {
		v, backend := startSplit(t, startOwnGateway, data(t)...)
		checkRestarts(t, v, backend, restarts)
	})
}

func checkRestarts(t *testing.T, v visitor, backend *process, restarts int) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var work sync.WaitGroup
	var reporters []*externalWorker
	var tasks, pages []*eventSource
	target := v.streams + "/api/sse/stream?heartbeat=event"
	for n := range 10 {
		r := &externalWorker{visitor: v, id: v.start(externalTask, "{}"), doubles: n%3 == 2}
		reporters = append(reporters, r)
		tasks = append(tasks, v.follow(r.id))
		target += "&task_id=" + r.id
		work.Go(func() { r.run(ctx) })
	}
	for i := range 5 {
		pages = append(pages, openEventSource(t, fmt.Sprintf("%s&request_id=page%d", target, i)))
	}
	version := v.subscribe("me")
	waitOpen(t, append(append(tasks, pages...), version)...)
	for n := range restarts {
		time.Sleep(time.Duration(100+rand.IntN(400)) * time.Millisecond)
		if n%3 == 2 {
			backend.wantStop(t)
			must(t, backend.start())
		} else {
			backend.restart(t)
		}
		if n == 0 {
			if got := v.post("/api/deployments/version", `{"request_id":"me","version":"deployed meanwhile"}`); !strings.HasPrefix(got, "202 ") {
				t.Errorf("announcing: got %s", got)
			}
		}
	}
	time.Sleep(200 * time.Millisecond)
	stop()
	work.Wait()
	for i, r := range reporters {
		r.until("/api/tasks/"+r.id+"/complete", `{"result":1}`)
		want := []string{"task_started"}
		for _, text := range r.texts {
			want = append(want, "progress_update "+text)
		}
		want = append(want, "task_completed")
		got := tasks[i].waitFor(t, soon, completed)
		r.wantStory("its stream", got, want)
		for n, page := range pages {
			got := page.waitFor(t, soon, func(events []message) bool {
				return completed(ofTask(events, r.id))
			})
			r.wantStory(fmt.Sprint("page ", n), got, want)
		}
	}
	wantStory(t, version, "version deployed meanwhile")
	for _, page := range pages {
		page.close()
	}
	version.close()
	eventually(t, soon, "the gauges are true", func() bool {
		text, sum := scrapeURL(v.client, v.api), 0.0
		for _, service := range []string{serviceTask, serviceVersion, servicePage} {
			sum += scrapeValue(text, `sse_gateway_active_connections{service="`+service+`"}`)
		}
		return sum == 0
	})
}

// ofTask returns the events that are about a task.
func ofTask(events []message, id string) (own []message) {
	for _, m := range events {
		if strings.Contains(m.Data, `"task_id":"`+id+`"`) {
			own = append(own, m)
		}
	}
	return own
}

func (r *externalWorker) wantStory(where string, events []message, want []string) {
	r.t.Helper()
	got := story(ofTask(events, r.id))
	for i := 0; i < max(len(got), len(want)); i++ {
		if r.doubles && i > 0 && i < len(got) && got[i] == got[i-1] { // it may be there twice
			got = slices.Delete(got, i, i+1)
		}
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			r.t.Errorf("%s of %s: got %d events, want %d; the first wrong one is number %d: %q", where, r.id, len(got), len(want), i+1, got[min(i, len(got)-1)])
			return
		}
	}
}

// While the disk is full, everything new is refused and shown to nobody, but reads and streams work. Once there is room
// again, everything works. A limit on the size of files stands for a full disk.
func TestRestoreNoRoom(t *testing.T) {
	needs(t, "sh", "prlimit")
	t.Parallel()
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	env := []string{"ADDR=" + addr, "DATA_DIR=" + t.TempDir(), "RETRY_MILLISECONDS=50"}
	backend := newProcess(t, "http://"+addr, env, "sh", "-c", `ulimit -Sf ${BLOCKS:-16} && exec "$0"`, os.Args[0]).mustStart(t) // 8 or 16 KiB
	v := newVisitor(t, backend.URL, backend.URL)
	id := v.start("external", "{}")
	es := v.follow(id)
	taken := 0
	for ; taken < 1000; taken++ {
		answer := v.post("/api/tasks/"+id+"/progress", fmt.Sprintf(`{"text":"report %d","seq":%d}`, taken+1, taken+1))
		if strings.HasPrefix(answer, "503 ") {
			if answer != `503 {"error":"cannot store","code":"cannot_store"}` {
				t.Errorf("got %s", answer)
			}
			break
		}
	}
	var want []string
	for n := range taken {
		want = append(want, fmt.Sprint("progress_update report ", n+1))
	}
	wantStory(t, es, append([]string{"task_started"}, want...)...)
	status := func() string { return v.getText("/api/tasks/" + id + "/status") }
	shown := status()
	if !strings.Contains(shown, fmt.Sprintf(`{"text":"report %d",`, taken)) {
		t.Errorf("after %d reports: got %s", taken, shown)
	}
	for range 2 {
		v.wantPost("/api/tasks", `{"type":"external"}`, `503 {"error":"cannot store","code":"cannot_store"}`)
		v.wantPost("/api/deployments/version", `{"version":"v1"}`, `503 {"error":"cannot store","code":"cannot_store"}`)
		v.wantPost("/api/tasks/"+id+"/cancel", "", `503 {"error":"cannot store","code":"cannot_store"}`)
		time.Sleep(2 * noRoomPause)
	}
	if got := status(); got != shown {
		t.Errorf("later: got %s, want %s", got, shown)
	}
	wantStory(t, v.follow(id), append([]string{"task_started"}, want...)...)
	if got := scrapeValue(v.getText("/metrics"), "sidecast_journal_writable"); got != 0 || v.status(v.api+"/readyz") != http.StatusOK {
		t.Errorf("got writable %v and readiness %d, want 0 and 200", got, v.status(v.api+"/readyz"))
	}

	backend.env = append(backend.env, "BLOCKS=0") // then what is there cannot be written again either
	backend.restart(t)                            // it still serves reads, and nothing was lost
	if got := status(); got != shown {
		t.Errorf("after a restart: got %s, want %s", got, shown)
	}
	r := &externalWorker{visitor: v, id: id}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.until("/api/tasks/"+id+"/progress", fmt.Sprintf(`{"text":"report %d","seq":%d}`, taken+1, taken+1))
	}()
	time.Sleep(2 * noRoomPause)
	if out, err := exec.Command("prlimit", "--pid", strconv.Itoa(backend.pid()), "--fsize=unlimited:unlimited").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	receive(t, done)
	v.complete(id)
	story := story(v.follow(id).waitFor(t, soon, completed))
	if n := len(story); n < taken+3 || story[taken+1] != fmt.Sprint("progress_update report ", taken+1) || story[taken+2] != "task_completed" {
		t.Errorf("with room again: got %q", story)
	}
}

// A change that could not be stored is shown to nobody until it is stored.
func TestRestoreShowsWhatIsStored(t *testing.T) {
	journalTest(t, 30, func(t *testing.T, d *crashDisk, j *journal) {
		api := newAPI(t, "")
		api.settle = synctest.Wait
		api.journal, api.tasks.journal, api.version.journal = j, j, j
		j.live = func() int { return 1 << 20 }
		go j.run()
		t.Cleanup(api.crash)
		const task = `{"type":"external","params":{"task_id":"a"}}`
		cannotStore := `503 {"error":"cannot store","code":"cannot_store"}`
		api.check("POST", "/api/tasks", task, cannotStore)
		api.checkGone("a")
		api.check("GET", "/api/tasks", "", `200 {"tasks":[]}`)
		room := func(n int) {
			d.mu.Lock()
			d.room = n
			d.mu.Unlock()
			time.Sleep(2 * noRoomPause)
		}
		room(0)
		api.checkStatus("a", taskRunning, "")

		// A deleted task is there until that is stored. A worker whose reports are refused is not lost.
		api.do("POST", "/api/tasks", `{"type":"external","params":{"task_id":"b"}}`)
		api.post("b/fail", `{"error":"no luck"}`)
		room(1)
		api.check("DELETE", "/api/tasks/b", "", cannotStore)
		api.checkStatus("b", taskFailed, "no luck")
		for range 3 {
			time.Sleep(200 * time.Second)
			api.checkPost("a/progress", `{"text":"x"}`, cannotStore)
		}
		room(0)
		api.checkGone("b")
		api.checkStatus("a", taskRunning, "")
	})
}

// Only one process may use a folder, and a start that fails says what is wrong with the folder.
func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	backend := startBackend(t, "DATA_DIR="+t.TempDir())
	dir := envValue(backend.env, "DATA_DIR")
	other := func(want string) {
		t.Helper()
		p := newProcess(t, "", []string{"ADDR=127.0.0.1:0", "DATA_DIR=" + dir}, os.Args[0])
		if err := p.start(); err == nil || !strings.Contains(err.Error(), "exit code 1") || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want exit code 1 and %q", err, want)
		}
	}
	other(fmt.Sprintf("process %d has it", backend.pid()))
	v := newVisitor(t, backend.URL, backend.URL)
	for range 3 {
		v.start("external", "{}")
	}
	backend.kill(t)
	file, err := os.OpenFile(filepath.Join(dir, "journal"), os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	if info, err := file.Stat(); err != nil || info.Mode() != 0o600 {
		t.Errorf("the journal has mode %v, want 0600", info.Mode())
	}
	_, err = file.WriteAt([]byte("?"), int64(len(journalHeader)+30))
	must(t, err)
	other(fmt.Sprintf("%s/journal: damaged at offset %d", dir, len(journalHeader)))
}

// A long journal does not hold up a stop.
func TestRestoreStopped(t *testing.T) {
	t.Parallel()
	env := map[string]string{"ADDR": "127.0.0.1:0", "DATA_DIR": t.TempDir()}
	ctx, stop := context.WithCancel(t.Context())
	backend := startBackend(t, "DATA_DIR="+env["DATA_DIR"])
	id := newVisitor(t, backend.URL, backend.URL).start("external", "{}")
	backend.kill(t)
	stop()
	var log testOutput
	code := run(ctx, nil, getenvFrom(env), io.Discard, &log)
	if want := `msg="stopping while the journal is read"`; code != 0 || !strings.Contains(log.String(), want) {
		t.Errorf("got exit code %d and %s, want 0 and %s", code, log.String(), want)
	}
	must(t, backend.start())
	if got := newVisitor(t, backend.URL, backend.URL).getText("/api/tasks/" + id + "/status"); !strings.Contains(got, `"running"`) {
		t.Errorf("got %s, want a running task", got)
	}
}

// BenchmarkRestart measures the time from the start of a process until it is ready, and its memory then. It has tasks
// of 100 events of 220 bytes each. If redis-server is installed, it does the same with streams in an append-only file.
//
//	SIDECAST_EVENTS=1000000 go test -run '^$' -bench Restart -benchtime 5x .
func BenchmarkRestart(b *testing.B) {
	events, _ := strconv.Atoi(cmp.Or(os.Getenv("SIDECAST_EVENTS"), "20000"))
	tasks := events / 100
	text := strings.Repeat("x", 72)
	bench := func(b *testing.B, command []string, env []string, ready func() bool) {
		resident := 0
		for b.Loop() {
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Env = append(os.Environ(), env...)
			must(b, cmd.Start())
			for !ready() {
				time.Sleep(time.Millisecond)
			}
			b.StopTimer()
			statm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", cmd.Process.Pid))
			var pages int
			fmt.Sscan(string(statm), new(int), &pages)
			resident = pages * os.Getpagesize()
			cmd.Process.Kill()
			cmd.Wait()
			b.StartTimer()
		}
		b.ReportMetric(float64(resident)/(1<<20), "MiB")
	}
	b.Run("sidecast", func(b *testing.B) {
		addr := fmt.Sprintf("127.0.0.1:%d", freePort(b))
		env := []string{"SIDECAST_TEST_MAIN=1", "ADDR=" + addr, "DATA_DIR=" + b.TempDir(), "TASK_MEMORY_BYTES=4000000000"}
		p := newProcess(b, "http://"+addr, env, os.Args[0]).mustStart(b)
		v := newVisitor(b, p.URL, p.URL)
		var reports strings.Builder
		for n := range 99 {
			fmt.Fprintf(&reports, `{"text":"report %d %s","value":0.5}`+"\n", n, text)
		}
		for range tasks {
			id := v.start("external", "{}")
			resp, err := v.client.Post(v.api+"/api/tasks/"+id+"/progress", ndjson, strings.NewReader(reports.String()))
			must(b, err)
			resp.Body.Close()
		}
		p.kill(b)
		bench(b, p.command, p.env, p.isUp)
	})
	b.Run("redis", func(b *testing.B) {
		if _, err := exec.LookPath("redis-server"); err != nil {
			b.Skip("the comparison needs redis-server")
		}
		port, dir := strconv.Itoa(freePort(b)), b.TempDir()
		command := []string{"redis-server", "--port", port, "--dir", dir, "--appendonly", "yes", "--aof-use-rdb-preamble", "no", "--save", "", "--logfile", "log",
			"--auto-aof-rewrite-percentage", "0"}
		say := func(commands string, last string) bool { // and wait for an answer that ends with last
			conn, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err != nil {
				return false
			}
			defer conn.Close()
			go io.WriteString(conn, commands)
			got := ""
			for buf := make([]byte, 64<<10); !strings.HasSuffix(got, last); {
				n, err := conn.Read(buf)
				if err != nil || strings.HasPrefix(string(buf[:n]), "-LOADING") {
					return false
				}
				got = string(buf[max(0, n-len(last)):n])
			}
			return true
		}
		cmd := exec.Command(command[0], command[1:]...)
		must(b, cmd.Start())
		ready := func() bool { return say("PING\r\n", "+PONG\r\n") }
		eventually(b, soon, "redis is up", ready)
		data := strings.Repeat("x", 220)
		for t := range tasks {
			var commands strings.Builder
			for range 100 {
				fmt.Fprintf(&commands, "XADD task-%d * data %s\r\n", t, data)
			}
			if !say(commands.String()+"PING\r\n", "+PONG\r\n") {
				b.Fatal("redis does not answer")
			}
		}
		time.Sleep(2 * time.Second) // redis syncs once a second
		cmd.Process.Kill()
		cmd.Wait()
		bench(b, command, nil, ready)
	})
}
