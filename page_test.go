package main

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"
)

// page opens a page stream for tasks, after a last event ID if there is one.
func (api *apiFixture) page(requestID, lastEventID string, taskIDs ...string) *apiStream {
	api.t.Helper()
	target := "/api/sse/stream?request_id=" + requestID
	for _, id := range taskIDs {
		target += "&task_id=" + id
	}
	return api.connect(target, lastEventID)
}

// taskStory returns what a page got of one task, in short.
func (s *apiStream) taskStory(id string) (words []string) {
	for _, e := range s.events() {
		if strings.Contains(e.Data, fmt.Sprintf(`"task_id":%q`, id)) {
			word := e.Name
			if _, rest, ok := strings.Cut(e.Data, `"event_type":"`); ok {
				word, _, _ = strings.Cut(rest, `"`)
			}
			words = append(words, word)
		}
	}
	return words
}

func (s *apiStream) checkTask(id, want string) {
	s.api.t.Helper()
	if got := strings.Join(s.taskStory(id), " "); got != want {
		s.api.t.Errorf("task %s: got %s, want %s", id, got, want)
	}
}

func TestPage(t *testing.T) {
	apiStory(t, "follows tasks and versions", "", func(t *testing.T, api *apiFixture) {
		api.tasks.policy.epoch, api.version.policy.epoch = newEpoch, newEpoch
		api.external("a", "b")
		one, two := api.page("one", "", "a", "b"), api.page("two", "", "b", "a")
		own := api.follow("a")
		api.checkAnnouncedToAll("1", 2, 0)
		api.post("a/progress", `{"text":"","value":0.5}`)
		api.post("b/complete", `{}`)
		for _, page := range []*apiStream{one, two} {
			page.checkTask("a", "task_started progress_update")
			page.checkTask("b", "task_started task_completed")
			if got := page.text(); strings.Count(got, ` version {"version":"1"}`) != 1 || strings.Contains(got, "connection_close") {
				t.Errorf("got\n%s\nwant version 1 once, and no end", got)
			}
		}
		own.checkStory("connection_open task_started progress_update") // alongside any number of pages

		// A page that comes back with its last ID and another set of tasks gets each event once.
		api.external("c")
		two.leave()
		api.post("a/progress", `{"text":"","value":0.6}`)
		again := api.page("two", two.lastID(), "a", "c")
		again.checkTask("a", "progress_update")
		again.checkTask("b", "")
		again.checkTask("c", "task_started")
		if got := again.text(); strings.Contains(got, " version ") {
			t.Errorf("got\n%s\nwant no version again", got)
		}
	})

	// The ID names the position in each log, its own first, so that nothing is kept for a page that is away.
	apiStory(t, "event IDs", "", func(t *testing.T, api *apiFixture) {
		epochs := []string{"aaaaaaaa", "bbbbbbbb"}
		api.tasks.policy.epoch = func() (epoch string) { epoch, epochs = epochs[0], epochs[1:]; return epoch }
		api.version.policy.epoch = func() string { return "vvvvvvvv" }
		api.external("a", "b")
		page := api.page("r", "", "b", "a")
		api.settle()
		api.checkAnnounced("r", "1", true)
		var ids []string
		for _, e := range page.events() {
			ids = append(ids, e.ID)
		}
		want := []string{
			"aaaaaaaa-0.bbbbbbbb-0.vvvvvvvv-0", "aaaaaaaa-1.bbbbbbbb-0.vvvvvvvv-0",
			"bbbbbbbb-1.aaaaaaaa-1.vvvvvvvv-0", "vvvvvvvv-1.aaaaaaaa-1.bbbbbbbb-1",
		}
		if !slices.Equal(ids, want) {
			t.Errorf("got IDs %q, want %q", ids, want)
		}
		// A task's own stream finds its position in it, too.
		api.connect("/api/sse/tasks?task_id=a", page.lastID()).checkStory("connection_open")
	})

	// A page may know of a task before the task is made.
	apiStory(t, "waits for a task", "", func(t *testing.T, api *apiFixture) {
		api.tasks.policy.epoch = newEpoch
		page, gone := api.page("r", "", "later", "never"), api.page("gone", "", "later")
		page.checkTask("later", "error")
		page.checkTask("never", "error")
		gone.leave()
		if got := api.tasks.awaited["later"].stats().followers; got != 1 {
			t.Errorf("got %d pages that wait, want 1", got)
		}
		before := page.lastID()
		for _, e := range page.events() {
			if e.Name == "error" && e.ID != "" {
				t.Errorf("an error has ID %q", e.ID)
			}
		}
		api.external("later")
		api.post("later/complete", `{}`)
		page.checkTask("later", "error task_started task_completed")
		if api.tasks.awaited["later"] != nil {
			t.Error("a task that has been made is waited for")
		}
		page.leave()
		again := api.page("r", page.lastID(), "later")
		again.checkTask("later", "")
		api.page("other", before, "later").checkTask("later", "task_started task_completed")
		if got := len(api.tasks.awaited); got != 0 {
			t.Errorf("got %d tasks waited for, want none", got)
		}
	})

	// The event that a task is unknown comes before the events of that task.
	apiStory(t, "is told of unknown tasks first", "", func(t *testing.T, api *apiFixture) {
		gateway := &steppedGateway{}
		defer gateway.close()
		api.conns.gateway = gateway
		page := &PageService{api.tasks, api.version}
		if _, _, err := page.OnConnect("r", connectRequest{token: "p", taskIDs: []string{"x", "y"}}); err != nil {
			t.Fatal(err)
		}
		api.settle()
		api.external("y")
		var got []string
		for range 3 {
			send := gateway.all()[0]
			got = append(got, send.String())
			gateway.reply(send, sendResult{taken: 1})
			api.settle()
		}
		if !strings.Contains(got[1], `{"error":"Task not found","task_id":"y"}`) || !strings.Contains(got[2], "task_started") {
			t.Errorf("got %q, want the error about y before its start", got)
		}
	})

	// A page stays when a task is forgotten. It must not keep the events in memory, as they are no longer counted.
	apiStory(t, "lets forgotten tasks go", "", func(t *testing.T, api *apiFixture) {
		text := strings.Repeat("x", 1000)
		api.external("a")
		page := api.page("r", "", "a")
		for i := range 100 {
			api.post("a/progress", fmt.Sprintf(`{"text":%q,"value":%v}`, text, float64(i)/100))
		}
		api.post("a/complete", `{}`)
		log := api.tasks.tasks["a"].events
		api.settle()
		api.gateway.fail(errNoAnswer)
		slow := api.page("slow", "", "a")
		api.do("DELETE", "/api/tasks/a", "")
		if got := len(page.taskStory("a")); got != 102 {
			t.Errorf("got %d events, want 102", got)
		}
		if log.stats().held < 100*len(text) {
			t.Error("events that a page still lacks were not kept")
		}
		slow.leave()
		if got := log.stats().held; got > 0 {
			t.Errorf("a forgotten task holds %d bytes", got)
		}
	})

	// The version stream and the page stream of one request_id are two connections; a broadcast counts them once.
	apiStory(t, "alongside a version stream", "", func(t *testing.T, api *apiFixture) {
		page, own := api.page("r", ""), api.subscribe("r")
		api.checkAnnouncedToAll("1", 1, 0)
		api.checkAnnounced("r", "2", true)
		page.checkStory("connection_open version:1 version:2")
		own.checkStory("connection_open version:1 version:2")
		api.wantConnected("page:r version:r")
		for service, want := range map[string]float64{"page": 1, "version": 1, "task": 0} {
			api.wantMetric(fmt.Sprintf("sse_gateway_active_connections{service=%q}", service), want)
		}
		time.Sleep(settleTime)
		api.page("r", "").checkStory("connection_open") // replaces only the first page
		page.checkStory("connection_open version:1 version:2 connection_close:replaced")
		own.checkStory("connection_open version:1 version:2")
	})
}

// If a task is created while its page connects, its events come after the error, and their IDs have all positions.
func TestRacePageConnectsWhileItsTaskIsMade(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.tasks.policy.epoch = newEpoch
		api.external("a")
		page := &apiStream{api: api, token: "p"}
		api.gateway.streams["p"] = page
		f := &follower{identifier: "page:r"}
		open, _, err := f.connect(api.conns, connectRequest{token: "p"}, func(follow func(*eventLog)) {
			api.tasks.watch([]string{"a", "later"}, follow)
			api.external("later")
			api.settle()
		})
		if err != nil || len(parsePositions(open.ID)) != 2 {
			t.Errorf("begins with %v, %v, want a position in both tasks", open, err)
		}
		page.checkTask("later", "error task_started")
		for _, e := range page.events() {
			if e.ID != "" && len(parsePositions(e.ID)) != 2 {
				t.Errorf("got ID %s, want a position in both tasks", e.ID)
			}
		}
	})
}

func TestPageTargets(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	many := strings.Repeat("&task_id=a", 60)
	for i := range maxPageTasks - 1 {
		many += fmt.Sprint("&task_id=t", i)
	}
	for query, want := range map[string]string{
		"?request_id=r":                       "200 ",
		"?request_id=r" + many:                "200 ", // one that is named twice counts once
		"?request_id=r" + many + "&task_id=x": `400 {"error":"a page stream follows at most 50 tasks","code":"too_many_tasks"}`,
		"?request_id=r&request_id=r":          `400 {"error":"request_id is given twice in the URL","code":"duplicate_field"}`,
		"?task_id=a":                          `400 {"error":"` + errBadID.Error() + `","code":"bad_id"}`,
		"?request_id=r&task_id=a:b":           `400 {"error":"` + errBadID.Error() + `","code":"bad_id"}`,
		"?request_id=r&task_id=":              `400 {"error":"` + errBadID.Error() + `","code":"bad_id"}`,
		"?request_id=r&lastEventId=close":     `410 {"error":"this stream is finished","code":"stream_finished"}`,
	} {
		api.wantConnect("t", "/api/sse/stream"+query, want)
	}
}

// The pages that follow one task are bounded, whether the task exists or not.
func TestPageFollowersAreBounded(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{true, false} {
		if known && underRace { // it takes ten times as long
			continue
		}
		api := newAPI(t, "LOG_LEVEL=error")
		api.conns.gateway = takeAll().gateway
		if known {
			api.external("a")
		}
		pages := &PageService{api.tasks, api.version}
		connect := func(request, task string) error {
			_, _, err := pages.OnConnect(request, connectRequest{token: newToken(), taskIDs: []string{task}})
			return err
		}
		for n := range maxFollowers {
			if err := connect(fmt.Sprint(n), "a"); err != nil {
				t.Fatal(n, err)
			}
		}
		if err := connect("one more", "a"); err != errNoRoom {
			t.Errorf("known %v: got %v, want %v", known, err, errNoRoom)
		}
		if err := connect("one more", "b"); err != nil {
			t.Errorf("another task: %v", err)
		}
	}
}

// takeAll returns a ConnectionManager with a gateway that takes everything.
func takeAll() *ConnectionManager {
	gateway := senderFunc(func(events []event) sendResult { return sendResult{taken: len(events)} })
	return newConnectionManager(gateway, slog.New(slog.DiscardHandler), unreadMetrics())
}

// BenchmarkAppend appends to a task that pages follow, and delivers the events.
func BenchmarkAppend(b *testing.B) {
	for _, followers := range []int{0, 1, 100} {
		b.Run(fmt.Sprint("followers=", followers), func(b *testing.B) {
			conns := takeAll()
			policy := taskLike()
			policy.limit, policy.dropped = 1000, new(series)
			log := newEventLog(&policy)
			for i := range followers {
				f := &follower{identifier: fmt.Sprint("page:", i)}
				f.connect(conns, connectRequest{token: newToken()}, all(log))
			}
			b.ReportAllocs()
			for b.Loop() {
				log.Append("data", false)
			}
			conns.Drain(b.Context())
		})
	}
}

// BenchmarkCatchUp gives 50,000 events to a page that has none of them: of one task, and of 50, with longer event IDs.
func BenchmarkCatchUp(b *testing.B) {
	for _, tasks := range []int{1, maxPageTasks} {
		b.Run(fmt.Sprint("tasks=", tasks), func(b *testing.B) {
			const events = 50_000
			taken, done := 0, make(chan bool)
			conns := newConnectionManager(senderFunc(func(run []event) sendResult {
				if taken += len(run); taken == events {
					done <- true
				}
				return sendResult{taken: len(run)}
			}), slog.New(slog.DiscardHandler), unreadMetrics())
			policy := taskLike()
			policy.epoch = newEpoch
			var logs []*eventLog
			for range tasks {
				log := newEventLog(&policy)
				for range events / tasks {
					log.Append(benchData, false)
				}
				logs = append(logs, log)
			}
			for b.Loop() {
				f := &follower{identifier: "page:" + newToken()}
				taken = 0
				f.connect(conns, connectRequest{token: newToken()}, all(logs...))
				<-done
			}
		})
	}
}
