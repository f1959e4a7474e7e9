package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

// start makes a task from the body of a request and returns its ID.
func (api *apiFixture) start(body string) (id string) {
	api.t.Helper()
	w := api.request("POST", "/api/tasks", body)
	var task taskView
	if err := json.Unmarshal(w.Body.Bytes(), &task); err != nil || w.Code != http.StatusAccepted {
		api.t.Fatalf("starting %s: got %d %s", body, w.Code, w.Body)
	}
	return task.TaskID
}

// external makes external tasks with IDs of our choice.
func (api *apiFixture) external(ids ...string) {
	api.t.Helper()
	for _, id := range ids {
		api.start(fmt.Sprintf(`{"type":"external","params":{"task_id":%q}}`, id))
	}
}

// demo makes a task that does this work, and returns its ID.
func (api *apiFixture) demo(work taskFunc) (id string) {
	api.t.Helper()
	api.tasks.kinds["demo"] = func(object) (taskFunc, error) { return work, nil }
	return api.start(`{"type":"demo"}`)
}

// taskReturns is work that is done at once.
func taskReturns(result any, err error) taskFunc {
	return func(context.Context, *reporter) (any, error) { return result, err }
}

// taskWaits works until its context ends.
func taskWaits(ctx context.Context, _ *reporter) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// taskSleeps works for some time and ignores its context.
func taskSleeps(d time.Duration) taskFunc {
	return func(context.Context, *reporter) (any, error) {
		time.Sleep(d)
		return "slept", nil
	}
}

// post posts to one of the routes of a task: "a/cancel".
func (api *apiFixture) post(route, body string) string {
	return api.do("POST", "/api/tasks/"+route, body)
}

// checkPost posts to one of the routes of a task and checks the answer.
func (api *apiFixture) checkPost(route, body, want string) {
	api.t.Helper()
	api.check("POST", "/api/tasks/"+route, body, want)
}

// status returns the status of a task, in one line.
func (api *apiFixture) status(id string) string {
	api.settle()
	return api.do("GET", "/api/tasks/"+id+"/status", "")
}

// checkGone checks that a task is unknown.
func (api *apiFixture) checkGone(id string) {
	api.t.Helper()
	api.settle()
	api.check("GET", "/api/tasks/"+id+"/status", "", `404 {"error":"task not found","code":"task_not_found"}`)
}

// succeed cancels and deletes an external task, and makes another one with its ID.
func (api *apiFixture) succeed(id string) {
	api.t.Helper()
	api.post(id+"/cancel", "")
	api.do("DELETE", "/api/tasks/"+id, "")
	api.external(id)
}

// checkStatus checks the status and the error of a task. A wantError of "" means null.
func (api *apiFixture) checkStatus(id string, want taskStatus, wantError string) {
	api.t.Helper()
	got, failure := api.status(id), "null"
	if wantError != "" {
		failure = string(marshal(wantError))
	}
	if !strings.Contains(got, `"status":"`+string(want)+`"`) || !strings.HasSuffix(got, `"error":`+failure+`}`) {
		api.t.Errorf("got status %.300s, want %s and error %.300s", got, want, failure)
	}
}

// follow opens a stream for a task.
func (api *apiFixture) follow(id string) *apiStream {
	api.t.Helper()
	return api.connect("/api/sse/tasks?task_id=" + id)
}

// updates returns the data of the stream's progress_updates.
func (s *apiStream) updates() (texts []string, values []float64) {
	for _, e := range s.events() {
		var event taskEvent[struct {
			Text  string
			Value float64
		}]
		if json.Unmarshal([]byte(e.Data), &event) == nil && event.EventType == "progress_update" {
			texts, values = append(texts, event.Data.Text), append(values, event.Data.Value)
		}
	}
	return texts, values
}

func TestTaskEvents(t *testing.T) {
	// Every event of a task, as the browser gets it.
	apiStory(t, "demo", "", func(t *testing.T, api *apiFixture) {
		id := api.start(`{"type":"demo","params":{"steps":2,"delay":1.5,"message":"done"}}`)
		stream := api.follow(id)
		time.Sleep(3 * time.Second)
		want := strings.ReplaceAll(`e-0 connection_open {"status":"connected"}
e-1 task_event {"event_type":"task_started","task_id":"ID","timestamp":"2000-01-01T00:00:00Z","data":null}
e-2 task_event {"event_type":"progress_update","task_id":"ID","timestamp":"2000-01-01T00:00:01.5Z","data":{"text":"step 1 of 2","value":0.5}}
e-3 task_event {"event_type":"progress_update","task_id":"ID","timestamp":"2000-01-01T00:00:03Z","data":{"text":"step 2 of 2","value":1}}
e-4 task_event {"event_type":"task_completed","task_id":"ID","timestamp":"2000-01-01T00:00:03Z","data":{"message":"done","steps":2}}
close connection_close {"reason":"task_completed"}
`, "ID", id)
		stream.wantText(want)
		api.follow(id).wantText(want)
		api.connect("/api/sse/tasks?task_id="+id, "e-3").checkStory("connection_open task_completed connection_close:task_completed")
	})
	apiStory(t, "external", "", func(t *testing.T, api *apiFixture) {
		api.external("a", "b")
		completes, fails := api.follow("a"), api.follow("b")
		api.checkPost("a/progress", `{"value":0.25}`, `200 {"event_id":"e-2"}`)
		api.checkPost("a/progress", `{"text":"half","value":0.5}`, `200 {"event_id":"e-3"}`)
		api.checkPost("a/complete", `{"result": [1, "<2>"]}`, `200 {"event_id":"e-4"}`)
		api.checkPost("b/fail", `{"error":"no \"luck\""}`, `200 {"event_id":"e-2"}`)
		head := `","task_id":"a","timestamp":"2000-01-01T00:00:00Z","data":`
		completes.wantText(`e-0 connection_open {"status":"connected"}
e-1 task_event {"event_type":"task_started` + head + `null}
e-2 task_event {"event_type":"progress_update` + head + `{"text":"","value":0.25}}
e-3 task_event {"event_type":"progress_update` + head + `{"text":"half","value":0.5}}
e-4 task_event {"event_type":"task_completed` + head + `[1,"<2>"]}
close connection_close {"reason":"task_completed"}
`)
		head = strings.Replace(head, `"a"`, `"b"`, 1)
		fails.wantText(`e-0 connection_open {"status":"connected"}
e-1 task_event {"event_type":"task_started` + head + `null}
e-2 task_event {"event_type":"task_failed` + head + `{"error":"no \"luck\""}}
close connection_close {"reason":"task_failed"}
`)
	})
	apiStory(t, "failing", "", func(t *testing.T, api *apiFixture) {
		id := api.start(`{"type":"failing","params":{"delay":5,"error_message":"on purpose"}}`)
		plain := api.start(`{"type":"failing"}`)
		time.Sleep(4 * time.Second)
		api.checkStatus(id, taskRunning, "")
		time.Sleep(time.Second)
		api.checkStatus(id, taskFailed, "on purpose")
		api.checkStatus(plain, taskFailed, "task failed")
	})
	apiStory(t, "unknown task", "", func(t *testing.T, api *apiFixture) {
		api.connect("/api/sse/tasks?task_id=a%22b", "e-7").wantText(` connection_open {"status":"connected"}
 error {"error":"Task not found","task_id":"a\"b"}
close connection_close {"reason":"task_not_found"}
`)
	})
}

// taskBrokenResult and taskBrokenError panic when they are encoded. That happens after the work is done, and must not
// crash the process.
type taskBrokenResult struct{}

func (taskBrokenResult) MarshalJSON() ([]byte, error) { panic("broken") }

type taskBrokenError struct{ text string }

func (e *taskBrokenError) Error() string { return e.text } // panics for nil

// However a task ends, there is one terminal event, and nothing after it changes the task.
func TestTaskEndsOnce(t *testing.T) {
	cancel := func(api *apiFixture, id string) { api.post(id+"/cancel", "") }
	closes := func(api *apiFixture, id string) { api.tasks.Close() }
	panics := func(context.Context, *reporter) (any, error) { panic("a detail") }
	exits := func(context.Context, *reporter) (any, error) { runtime.Goexit(); return nil, nil }
	var noError *taskBrokenError
	for _, tt := range []struct {
		name      string
		work      taskFunc
		act       func(api *apiFixture, id string) // once it runs
		want      taskStatus
		wantError string
	}{
		{"success", taskReturns(7, nil), nil, taskCompleted, ""},
		{"error", taskReturns(7, errors.New("no luck")), nil, taskFailed, "no luck"},
		{"panic", panics, nil, taskFailed, "internal error"},
		{"panic of the result", taskReturns(taskBrokenResult{}, nil), nil, taskFailed, "internal error"},
		{"panic of the error", taskReturns(nil, noError), nil, taskFailed, "internal error"},
		{"exit of the goroutine", exits, nil, taskFailed, "internal error"},
		{"timeout", taskWaits, nil, taskFailed, "timed out"},
		{"timeout of deaf work", taskSleeps(time.Minute), nil, taskFailed, "timed out"},
		{"cancel", taskWaits, cancel, taskCancelled, ""},
		{"cancel of deaf work", taskSleeps(time.Minute), cancel, taskCancelled, ""},
		{"shutdown", taskWaits, closes, taskFailed, "server is shutting down"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			apiTest(t, "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
				id := api.demo(tt.work)
				stream := api.follow(id)
				api.settle()
				if tt.act != nil {
					tt.act(api, id)
				}
				time.Sleep(2 * time.Minute)
				cancel(api, id)
				closes(api, id)
				stream.checkStory(fmt.Sprintf("connection_open task_started task_%s connection_close:task_%[1]s", tt.want))
				api.checkStatus(id, tt.want, tt.wantError)
				api.wantMetric(`task_executions_total{type="demo",status="`+string(tt.want)+`"}`, 1)
			})
		})
	}
}

func TestTaskLog(t *testing.T) {
	// The log has the value and the stack of a panic; the browser must see neither.
	apiStory(t, "panic", "", func(t *testing.T, api *apiFixture) {
		stream := api.follow(api.demo(func(context.Context, *reporter) (any, error) { panic("a detail") }))
		if got := stream.text(); strings.Contains(got, "a detail") {
			t.Errorf("the stream shows the panic:\n%s", got)
		}
		if log := api.logged.String(); !strings.Contains(log, `panic="a detail"`) || !strings.Contains(log, "tasks_test.go") {
			t.Errorf("the log lacks the value or the stack:\n%s", log)
		}
	})
	apiStory(t, "failure", "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.post("a/fail", `{"error":"no luck"}`)
		api.external("b")
		api.post("b/complete", `{}`)
		api.external("c")
		api.post("c/cancel", ``)
		api.start(`{"type":"failing","params":{"delay":0}}`)
		api.settle()
		log := api.logged.String()
		if got := strings.Count(log, `msg="task failed"`); got != 2 || !strings.Contains(log, `level=INFO msg="task failed" task_id=a type=external err="no luck"`+"\n") {
			t.Errorf("got %d lines, want 2:\n%s", got, log)
		}
	})
}

func TestTaskWorkers(t *testing.T) {
	apiStory(t, "a pending task ends once", "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		api.demo(taskWaits)
		cancelled, closed := api.demo(taskWaits), api.demo(taskWaits)
		first, second := api.follow(cancelled), api.follow(closed)
		api.post(cancelled+"/cancel", "")
		api.tasks.Close()
		first.checkStory("connection_open task_cancelled connection_close:task_cancelled")
		second.checkStory("connection_open task_failed connection_close:task_failed")
		api.checkStatus(cancelled, taskCancelled, "")
		api.checkStatus(closed, taskFailed, "server is shutting down")
		api.check("POST", "/api/tasks", `{"type":"demo"}`, `503 {"error":"shutting down","code":"shutting_down"}`)
		api.check("POST", "/api/tasks", `{"type":"external"}`, `503 {"error":"shutting down","code":"shutting_down"}`)
	})

	// A worker is busy until its work returns, even if the task has ended before. Otherwise work that ignores its
	// context would pile up.
	apiStory(t, "busy until the work returns", "TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=0", func(t *testing.T, api *apiFixture) {
		api.post(api.demo(taskSleeps(time.Minute))+"/cancel", "")
		api.check("POST", "/api/tasks", `{"type":"demo"}`, `503 {"error":"task queue is full","code":"queue_full"}`)
		time.Sleep(time.Minute)
		api.settle()
		api.checkStatus(api.demo(taskWaits), taskRunning, "")
	})
	apiStory(t, "none for an external task", "TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=0", func(t *testing.T, api *apiFixture) {
		api.external("a", "b", "c")
		api.checkStatus(api.demo(taskWaits), taskRunning, "")
		api.external("d")
		api.checkStatus("d", taskRunning, "")
	})
}

func TestTaskWorkersAndQueue(t *testing.T) {
	apiTest(t, "TASK_MAX_WORKERS=2 TASK_QUEUE_LIMIT=2", func(t *testing.T, api *apiFixture) {
		var ids []string
		for range 4 {
			ids = append(ids, api.demo(taskWaits))
		}
		checkRunning := func(want string) {
			t.Helper()
			var got string
			for i, id := range ids {
				if strings.Contains(api.status(id), `"status":"running"`) {
					got += fmt.Sprint(i)
				}
			}
			if got != want {
				t.Errorf("got tasks %s running, want %s", got, want)
			}
		}
		checkFull := func() {
			t.Helper()
			api.check("POST", "/api/tasks", `{"type":"demo"}`, `503 {"error":"task queue is full","code":"queue_full"}`)
		}
		checkRunning("01")
		checkFull()
		api.post(ids[2]+"/cancel", "") // pending: gives its place in the queue to 4
		ids = append(ids, api.demo(taskWaits))
		checkRunning("01")
		checkFull()
		api.post(ids[1]+"/cancel", "") // running: gives its worker to the one that waits longest
		checkRunning("03")
		api.post(ids[0]+"/cancel", "")
		checkRunning("34")
	})
}

func TestTaskParams(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		long := strings.Repeat("x", maxTaskText)
		for _, body := range []string{
			`{"type":"demo","params":{}}`,
			`{"type":"demo","params":{"steps":1e0,"delay":0,"message":"","unknown":null}}`,
			`{"type":"failing","params":{"delay":0.5,"error_message":"` + long + `"}}`,
			`{"type":"external","params":{"title":"` + long + `"}}`,
		} {
			api.start(body)
		}
		const (
			noObject = "body must be one JSON object"
			noKind   = "unknown task type"
			noParams = "params must be an object"
			badSteps = "steps must be a whole number from 1 to 10000"
			badDelay = "delay must be a number from 0 to 3600"
			badTitle = "title must be a string of at most 8192 bytes"
		)
		for body, want := range map[string]string{
			``:                              noObject,
			`[]`:                            noObject,
			`{}`:                            "a field is missing or empty",
			`{"type":null}`:                 "a field has the wrong type",
			`{"type":"Demo"}`:               noKind,
			`{"type":"task"}`:               noKind,
			`{"type":"demo","params":null}`: noParams,
			`{"type":"demo","params":"{}"}`: noParams,
			`{"type":"demo","params":{"steps":1,"steps":1}}`:                "a field is given twice",
			`{"type":"demo","params":{"steps":0}}`:                          badSteps,
			`{"type":"demo","params":{"steps":1.5}}`:                        badSteps,
			`{"type":"demo","params":{"steps":10001}}`:                      badSteps,
			`{"type":"demo","params":{"steps":"3"}}`:                        badSteps,
			`{"type":"demo","params":{"delay":-1}}`:                         badDelay,
			`{"type":"demo","params":{"delay":1e999}}`:                      badDelay,
			`{"type":"demo","params":{"message":null}}`:                     "message must be a string of at most 8192 bytes",
			`{"type":"failing","params":{"delay":null}}`:                    badDelay,
			`{"type":"failing","params":{"error_message":"x` + long + `"}}`: "error_message must be a string of at most 8192 bytes",
			`{"type":"external","params":{"title":"x` + long + `"}}`:        badTitle,
			`{"type":"external","params":{"title":1}}`:                      badTitle,
			`{"type":"external","params":{"task_id":1}}`:                    "task_id must be a string",
			`{"type":"external","params":{"task_id":""}}`:                   errBadTaskID.Error(),
			`{"type":"external","params":{"task_id":"a:b"}}`:                errBadTaskID.Error(),
		} {
			got := api.do("POST", "/api/tasks", body)
			if before, _, _ := strings.Cut(got, `","code":"`); before != `400 {"error":"`+want {
				t.Errorf("%.80s: got %s, want %s", body, got, want)
			}
		}
		api.check("POST", "/api/tasks", strings.Repeat(" ", maxTaskBody)+`{}`, `413 {"error":"request body too large","code":"too_large"}`)
		api.check("POST", "/api/tasks", `{"type":"demo"}`, `415 {"error":"content type must be application/json","code":"media_type"}`,
			"Content-Type: application/x-www-form-urlencoded")
		if got := len(api.tasks.List()); got != 4 {
			t.Errorf("got %d tasks, want 4", got)
		}
	})
}

func TestTaskAnswers(t *testing.T) {
	// The answer has the task's current status.
	apiStory(t, "start", "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		api.check("POST", "/api/tasks", `{"type":"external","params":{"task_id":"a+b&c"}}`,
			`202 {"status":"running","stream_url":"/api/sse/tasks?task_id=a%2Bb%26c","task_id":"a+b&c"}`)
		api.connect("/api/sse/tasks?task_id=a%2Bb%26c").checkStory("connection_open task_started")
		for _, want := range []taskStatus{taskRunning, taskPending} {
			if got := api.do("POST", "/api/tasks", `{"type":"demo"}`); !strings.Contains(got, `"status":"`+string(want)+`"`) {
				t.Errorf("got %s, want %s", got, want)
			}
		}
	})
	apiStory(t, "status", "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		api.external("running", "completed", "failed", "cancelled")
		api.start(`{"type":"external","params":{"task_id":"titled","title":"A <b>"}}`)
		api.post("titled/progress", `{"text":"half","value":0.5}`)
		api.demo(taskWaits)
		pending := api.demo(taskWaits)
		time.Sleep(1500 * time.Millisecond)
		api.post("completed/complete", `{"result":{"n": [1, null]}}`)
		api.post("failed/fail", `{"error":"no luck"}`)
		api.post("cancelled/cancel", "")
		const (
			runs = `"start_time":"2000-01-01T00:00:00Z","end_time":null`
			ran  = `"start_time":"2000-01-01T00:00:00Z","end_time":"2000-01-01T00:00:01.5Z"`
		)
		const none = `"title":null,"progress":null,`
		for id, want := range map[string]string{
			pending:     `"type":"demo","status":"pending",` + none + `"start_time":null,"end_time":null,"result":null,"error":null`,
			"running":   `"type":"external","status":"running",` + none + runs + `,"result":null,"error":null`,
			"titled":    `"type":"external","status":"running","title":"A <b>","progress":{"text":"half","value":0.5},` + runs + `,"result":null,"error":null`,
			"completed": `"type":"external","status":"completed",` + none + ran + `,"result":{"n":[1,null]},"error":null`,
			"failed":    `"type":"external","status":"failed",` + none + ran + `,"result":null,"error":"no luck"`,
			"cancelled": `"type":"external","status":"cancelled",` + none + ran + `,"result":null,"error":null`,
		} {
			if got, want := api.status(id), `200 {"task_id":"`+id+`",`+want+`}`; got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		}
		api.checkGone("unknown")
	})
	apiStory(t, "list, newest first", "", func(t *testing.T, api *apiFixture) {
		var want []string
		for i := range maxTaskList + 5 { // all in the same instant
			want = append(want, fmt.Sprint("task-", i))
			api.external(want[i])
		}
		slices.Reverse(want)
		got := regexp.MustCompile(`task-\d+`).FindAllString(api.do("GET", "/api/tasks", ""), -1)
		if !slices.Equal(got, want[:maxTaskList]) {
			t.Errorf("got %v\nwant %v", got, want[:maxTaskList])
		}
	})
	apiStory(t, "cancel and delete", "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.checkPost("unknown/cancel", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("DELETE", "/api/tasks/unknown", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("DELETE", "/api/tasks/a", "", `404 {"error":"task is not finished","code":"task_not_finished"}`)
		api.checkPost("a/cancel", "", `200 {"success":true,"message":"task cancelled"}`)
		api.checkPost("a/cancel", "", `404 {"error":"task is already finished","code":"task_finished"}`)
		api.check("DELETE", "/api/tasks/a", "", `200 {"success":true,"message":"task deleted"}`)
		api.check("DELETE", "/api/tasks/a", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.checkGone("a")
		api.check("GET", "/api/tasks", "", `200 {"tasks":[]}`)
	})
	apiStory(t, "history", "TASK_EVENT_LIMIT=5000", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.post("a/progress", `{"text":"<1>","value":0.5}`)
		const (
			head     = `"task_id":"a","timestamp":"2000-01-01T00:00:00Z","data":`
			started  = `{"id":"e-1","data":{"event_type":"task_started",` + head + `null}}`
			progress = `{"id":"e-2","data":{"event_type":"progress_update",` + head + `{"text":"<1>","value":0.5}}}`
		)
		checkEvents := func(query, want string) {
			t.Helper()
			api.check("GET", "/api/tasks/a/events"+query, "", "200 "+want)
		}
		all := `{"events":[` + started + `,` + progress + `],"status":"running"}`
		for _, query := range []string{"", "?after=", "?after=e-0", "?after=f-1", "?after=e", "?after=e-x", "?after=e-3", "?after=close", "?after=f-1.g-1"} {
			checkEvents(query, all)
		}
		checkEvents("?after=f-1.e-1", `{"events":[`+progress+`],"status":"running"}`) // an event ID of a page
		checkEvents("?after=e-1", `{"events":[`+progress+`],"status":"running"}`)
		checkEvents("?after=e-2", `{"events":[],"status":"running"}`)
		api.check("GET", "/api/tasks/b/events", "", `404 {"error":"task not found","code":"task_not_found"}`)

		for range 2 * maxHistory {
			api.post("a/progress", `{"value":0.5}`)
		}
		api.post("a/complete", `{}`)
		total, last := 0, ""
		for range 4 {
			w := api.request("GET", "/api/tasks/a/events?after="+last, "")
			events := regexp.MustCompile(`"id":"(.*?)"`).FindAllStringSubmatch(w.Body.String(), -1)
			if len(events) > maxHistory || !strings.HasSuffix(w.Body.String(), `],"status":"completed"}`+"\n") {
				t.Fatalf("got %d events, want %d at most and status completed", len(events), maxHistory)
			}
			if h := w.Header(); h.Get("Content-Type") != "application/json" || h.Get("Cache-Control") != "no-store" {
				t.Errorf("got headers %v", h)
			}
			if len(events) == 0 {
				break
			}
			total += len(events)
			last = events[len(events)-1][1]
		}
		if want := 2*maxHistory + 3; total != want || last != fmt.Sprint("e-", want) {
			t.Errorf("got %d events up to %s, want %d", total, last, want)
		}
	})
}

// A task_id that a client chooses must be usable in the path of its reports.
func TestTaskIDsWorkInPaths(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		for _, id := range []string{plainChars, strings.Repeat("x", maxID), "...", "import-7"} {
			api.external(id)
			api.checkPost(id+"/progress", `{"value":0}`, `200 {"event_id":"e-2"}`)
		}
		for _, id := range []string{"", ".", "..", "a/b", "a b", "a%62", "é", "a:b", "a?b", "a#b", `a\b`, "a[b]", "<a>", "a\x00", strings.Repeat("x", maxID+1)} {
			got := api.do("POST", "/api/tasks", `{"type":"external","params":{"task_id":`+string(marshal(id))+`}}`)
			if want := `400 {"error":"task_id must be 1 to 128 of `; !strings.HasPrefix(got, want) || !strings.HasSuffix(got, `,"code":"bad_id"}`) {
				t.Errorf("%q: got %s, want %s", id, got, want)
			}
		}
	})
}

// A proxy that allows only some task IDs decides by the path, so an ID has exactly one spelling.
func TestTaskPathsArePlain(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("abc")
		const refused = `400 {"error":"path must be clean and without escapes","code":"bad_path"}`
		for _, path := range []string{
			"/api/tasks/%61bc/cancel", "/api/tasks/ab%63/cancel", "/api/tasks/x/../abc/cancel", "/api/tasks//abc/cancel", "/api/tasks/./abc/cancel",
			"//api/tasks/abc/cancel", "/api/./tasks/abc/cancel", "/api/sse/../tasks/abc/cancel", "/api/%74asks/abc/cancel", "/api/tasks/abc%2Fcancel",
			"/api/tasks/abc/cance%6c", "/api/tasks/x%2F..%2Fabc/cancel", "/api/tasks/\xe9/cancel", "//", "/./", "*",
		} {
			api.check("POST", path, "", refused)
		}
		api.check("GET", "/api/tasks/%61bc/status", "", refused)
		api.check("GET", "/api/tasks/%61bc/events", "", refused)
		api.check("DELETE", "/api/tasks/%61bc", "", refused)
		api.checkStatus("abc", taskRunning, "")
	})
}

func TestTaskProgress(t *testing.T) {
	apiStory(t, "never falls", "", func(t *testing.T, api *apiFixture) {
		reported := []float64{-1, math.NaN(), 0.25, 0.125, math.Inf(-1), 0.5, math.NaN(), 2, math.Inf(1), 0}
		_, got := api.follow(api.demo(func(_ context.Context, p *reporter) (any, error) {
			for _, value := range reported {
				p.Report("", value)
			}
			return nil, nil
		})).updates()
		if want := []float64{0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 1, 1, 1}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})

	// A report of work that goes on after the end of its task is ignored.
	apiStory(t, "after the end", "", func(t *testing.T, api *apiFixture) {
		id := api.demo(func(ctx context.Context, p *reporter) (any, error) {
			<-ctx.Done()
			p.Report("too late", 1)
			return nil, nil
		})
		stream := api.follow(id)
		api.post(id+"/cancel", "")
		stream.checkStory("connection_open task_started task_cancelled connection_close:task_cancelled")
	})

	fits, long, noText := strings.Repeat("é", maxTaskText/2), "x"+strings.Repeat("é", maxTaskText/2), strings.Repeat("\x80", maxTaskText+1)
	cut := long[:maxTaskText-1]
	for name, tt := range map[string]struct {
		texts, want    [2]string
		err, wantError string
	}{
		"long text is cut between characters": {[2]string{fits, long}, [2]string{fits, cut}, long, cut},
		"text that is not UTF-8":              {[2]string{noText, "caf\xe9"}, [2]string{"", "caf"}, noText, "task failed"},
	} {
		apiStory(t, name, "", func(t *testing.T, api *apiFixture) {
			id := api.demo(func(_ context.Context, p *reporter) (any, error) {
				p.Report(tt.texts[0], 0)
				p.Report(tt.texts[1], 0)
				return nil, errors.New(tt.err)
			})
			if got, _ := api.follow(id).updates(); !slices.Equal(got, tt.want[:]) {
				t.Errorf("got texts %.20q, want %.20q", got, tt.want)
			}
			api.checkStatus(id, taskFailed, tt.wantError)
		})
	}
}

func TestTaskResultLimit(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		fits := strings.Repeat("x", maxTaskResult-len(`""`))
		for _, tt := range []struct {
			result    any
			want      taskStatus
			wantError string
		}{
			{fits, taskCompleted, ""},
			{nil, taskCompleted, ""},
			{fits + "x", taskFailed, "result is larger than 63000 bytes"},
			{make(chan int), taskFailed, "result has no JSON form"},
			{math.NaN(), taskFailed, "result has no JSON form"},
		} {
			api.checkStatus(api.demo(taskReturns(tt.result, nil)), tt.want, tt.wantError)
		}
		api.external("a")
		api.checkPost("a/complete", `{"result":"`+fits+`x"}`, `413 {"error":"result is larger than 63000 bytes","code":"too_large"}`)
		api.checkStatus("a", taskRunning, "")
		api.checkPost("a/complete", `{"result":"`+fits+`"}`, `200 {"event_id":"e-2"}`)
	})
}

func TestTaskForgotten(t *testing.T) {
	apiStory(t, "after a while", "TASK_CLEANUP_INTERVAL_SECONDS=10 TASK_TIMEOUT_SECONDS=1000", func(t *testing.T, api *apiFixture) {
		api.external("a")
		time.Sleep(time.Minute) // a running task is not forgotten
		api.post("a/complete", `{}`)
		time.Sleep(10*time.Second - time.Nanosecond)
		api.checkStatus("a", taskCompleted, "")
		time.Sleep(time.Nanosecond)
		api.checkGone("a")
	})

	// A browser of the first task may come back to the second one. The events of both have the same numbers.
	apiStory(t, "successor is followed from its start", "", func(t *testing.T, api *apiFixture) {
		api.tasks.policy.epoch = newEpoch
		api.external("a")
		first := api.follow("a")
		first.leave()
		api.succeed("a")
		api.connect("/api/sse/tasks?task_id=a", first.lastID()).checkStory("connection_open task_started")
	})

	// A task's timer does nothing to a later task with the same task_id. So that one is not forgotten, either.
	apiStory(t, "timer of a predecessor", "TASK_CLEANUP_INTERVAL_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("a")
		called := false
		api.tasks.afterwards(api.tasks.task("a"), time.Minute, func(*task) { called = true })
		api.succeed("a")
		time.Sleep(2 * time.Minute)
		api.checkStatus("a", taskRunning, "")
		if called {
			t.Error("the timer of the deleted task fired for its successor")
		}
	})
}

// Of several at once one deletes a task, also while that is on its way to the disk.
func TestTaskDeletedOnce(t *testing.T) {
	t.Parallel()
	for name, env := range map[string][]string{"memory": nil, "journal": {"DATA_DIR=" + t.TempDir()}} {
		backend := startBackend(t, env...)
		id := newVisitor(t, backend.URL, backend.URL).start("failing", `{"delay":0}`)
		target := backend.URL + "/api/tasks/" + id
		eventually(t, soon, "the task has ended", func() bool {
			return strings.Contains(mustAsk(t, "GET", target+"/status", ""), `"failed"`)
		})
		answers := make(chan int, 20)
		for range cap(answers) {
			go func() {
				status, _ := ask(t, "DELETE", target, "")
				answers <- status
			}()
		}
		counts := map[int]int{}
		for range cap(answers) {
			counts[receive(t, answers)]++
		}
		if want := map[int]int{http.StatusOK: 1, http.StatusNotFound: cap(answers) - 1}; !maps.Equal(counts, want) {
			t.Errorf("%s: got statuses %v, want %v", name, counts, want)
		}
	}
}

// Nothing may keep a deleted task in memory, not even a cleanup timer that has long to run.
func TestDeletedTaskIsFreed(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "TASK_CLEANUP_INTERVAL_SECONDS=31536000")
	api.external("a")
	api.post("a/complete", `{"result":1}`)
	deleted := weak.Make(api.tasks.tasks["a"])
	api.do("DELETE", "/api/tasks/a", "")
	eventually(t, patience, "freed", func() bool {
		runtime.GC()
		return deleted.Value() == nil
	})
}

func TestExternalReports(t *testing.T) {
	// A report that comes too early, too late or to the wrong task is refused and changes nothing.
	apiStory(t, "refused", "", func(t *testing.T, api *apiFixture) {
		ours := api.demo(taskWaits)
		api.external("completed", "failed", "cancelled")
		api.post("completed/complete", `{"result":1}`)
		api.post("failed/fail", `{"error":"no luck"}`)
		api.post("cancelled/cancel", "")
		before := api.do("GET", "/api/tasks", "")
		for id, want := range map[string]string{
			"unknown":   `404 {"error":"task not found","code":"task_not_found"}`,
			ours:        `409 {"error":"task is not external","code":"not_external","status":"running"}`,
			"completed": `409 {"error":"task is finished","code":"task_finished","status":"completed"}`,
			"failed":    `409 {"error":"task is finished","code":"task_finished","status":"failed"}`,
			"cancelled": `409 {"error":"task cancelled","code":"task_cancelled","status":"cancelled"}`,
		} {
			api.checkPost(id+"/progress", `{"text":"x","value":1}`, want)
			api.checkPost(id+"/complete", `{"result":2}`, want)
			api.checkPost(id+"/fail", `{"error":"x"}`, want)
		}
		api.check("GET", "/api/tasks", "", before)
		api.follow("cancelled").checkStory("connection_open task_started task_cancelled connection_close:task_cancelled")
	})
	apiStory(t, "bodies", "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		const (
			noObject = `400 {"error":"body must be one JSON object","code":"not_json"}`
			tooLarge = `413 {"error":"request body too large","code":"too_large"}`
			badValue = `400 {"error":"value must be a number from 0 to 1","code":"bad_value"}`
			badText  = `400 {"error":"text must be a string","code":"bad_params"}`
			badSeq   = `400 {"error":"seq must be a whole number from 1","code":"bad_seq"}`
			nothing  = `400 {"error":"text or value must be there","code":"missing_field"}`
			twice    = `400 {"error":"a field is given twice","code":"duplicate_field"}`
		)
		for body, want := range map[string]string{
			``:                         noObject,
			`[]`:                       noObject,
			`{}`:                       nothing,
			`{"value":null}`:           nothing,
			`{"seq":1}`:                nothing,
			`{"value":"1"}`:            badValue,
			`{"value":1e999}`:          badValue,
			`{"value":50}`:             badValue, // a percentage
			`{"value":1.0101}`:         badValue,
			`{"value":"x","text":"x"}`: badValue,
			`{"text":1,"value":1}`:     badText,
			`{"text":null,"value":1}`:  badText,
			`{"value":1,"seq":0}`:      badSeq,
			`{"value":1,"seq":-1}`:     badSeq,
			`{"value":1,"seq":1.5}`:    badSeq,
			`{"value":1,"seq":1e16}`:   badSeq,
			`{"value":1,"seq":"1"}`:    badSeq,
			`{"value":1,"seq":null}`:   badSeq,
			`{"value":1,"value":1}`:    twice,
			`{"value":1,"a":1,"a":1}`:  twice,
		} {
			api.checkPost("a/progress", body, want)
		}
		api.checkPost("a/complete", `null`, noObject)
		api.checkPost("a/complete", strings.Repeat(" ", maxTaskBody)+`{}`, tooLarge)
		api.checkPost("a/fail", `"no luck"`, noObject)
		api.checkPost("a/fail", strings.Repeat(" ", maxFailBody)+`{}`, tooLarge)
		api.follow("a").checkStory("connection_open task_started")
	})

	// If a failure were refused because of its text, the task would run on until it times out.
	apiStory(t, "a failure is never lost", "", func(t *testing.T, api *apiFixture) {
		trace := "x" + strings.Repeat("é", maxTaskText)
		for body, want := range map[string]string{
			`{"error":"no luck"}`:       "no luck",
			`{"error":"` + trace + `"}`: trace[:maxTaskText-1],
			`{"error":"` + strings.Repeat("x", maxFailBody-len(`{"error":""}`)) + `"}`: strings.Repeat("x", maxTaskText),
			`{}`:                     "task failed",
			`{"error":""}`:           "task failed",
			`{"error":null}`:         "task failed",
			`{"error":7}`:            "task failed",
			`{"error":["no luck"]}`:  "task failed",
			`{"error":{"code":1}}`:   "task failed",
			`{"message":"no luck"}`:  "task failed",
			"{\"error\":\"no\xff\"}": "no\uFFFD",
		} {
			id := api.start(`{"type":"external"}`)
			api.checkPost(id+"/fail", body, `200 {"event_id":"e-2"}`)
			api.checkStatus(id, taskFailed, want)
			api.checkPost(id+"/fail", body, `200 {"event_id":"e-2"}`) // the same when it is repeated
		}
	})

	// A report may have only a text or a value. The other stays as it was.
	apiStory(t, "progress keeps the last", "", func(t *testing.T, api *apiFixture) {
		long := "x" + strings.Repeat("é", maxTaskText)
		api.external("a")
		stream := api.follow("a")
		for _, body := range []string{
			`{"text":"first"}`, `{"value":0.25}`, `{"text":"second","value":null}`, `{"text":"","value":0.125}`, `{"text":"` + long + `"}`,
			`{"value":-1}`, `{"value":1.01}`,
		} {
			api.post("a/progress", body)
		}
		cut := long[:maxTaskText-1]
		texts, values := stream.updates()
		if want := []string{"first", "first", "second", "", cut, cut, cut}; !slices.Equal(texts, want) {
			t.Errorf("got texts %.100q, want %.100q", texts, want)
		}
		if want := []float64{0, 0.25, 0.25, 0.25, 0.25, 0.25, 1}; !slices.Equal(values, want) {
			t.Errorf("got values %v, want %v", values, want)
		}
	})

	// A worker that did not get the answer to its last report repeats it.
	apiStory(t, "repeated end", "", func(t *testing.T, api *apiFixture) {
		api.external("completed", "empty", "failed")
		const (
			taken     = `200 {"event_id":"e-2"}`
			completed = `409 {"error":"task is finished","code":"task_finished","status":"completed"}`
			failed    = `409 {"error":"task is finished","code":"task_finished","status":"failed"}`
		)
		for range 2 {
			api.checkPost("completed/complete", `{"result":{"a": [1, "<é>"]}}`, taken)
			api.checkPost("empty/complete", `{}`, taken)
			api.checkPost("failed/fail", `{"error":"no luck"}`, taken)
		}
		api.checkPost("completed/complete", `{"result":{"a":[1,"<é>"]}}`, taken)
		api.checkPost("empty/complete", `{"result":null}`, taken)
		api.checkPost("completed/complete", `{"result":{"a":[1,"<è>"]}}`, completed)
		api.checkPost("completed/complete", `{}`, completed)
		api.checkPost("completed/fail", `{"error":"no luck"}`, completed)
		api.checkPost("failed/fail", `{"error":"no"}`, failed)
		api.checkPost("failed/complete", `{}`, failed)
		api.follow("completed").checkStory("connection_open task_started task_completed connection_close:task_completed")
	})

	// A worker that numbers its reports may repeat one.
	apiStory(t, "repeated progress", "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("a")
		stream := api.follow("a")
		const again = `200 {"event_id":"e-3","repeated":true}`
		api.checkPost("a/progress", `{"value":0.1,"seq":1}`, `200 {"event_id":"e-2"}`)
		api.checkPost("a/progress", `{"value":0.5,"seq":7}`, `200 {"event_id":"e-3"}`)
		for range 3 { // each is a sign of life
			time.Sleep(9 * time.Second)
			api.checkPost("a/progress", `{"value":0.5,"seq":7}`, again)
		}
		api.checkPost("a/progress", `{"value":0.9,"seq":3}`, again)
		api.checkPost("a/progress", `{"value":0.6}`, `200 {"event_id":"e-4"}`)
		api.checkPost("a/complete", `{"result":1}`, `200 {"event_id":"e-5"}`)
		api.checkPost("a/progress", `{"value":0.5,"seq":7}`, `200 {"event_id":"e-5","repeated":true}`)
		api.checkPost("a/progress", `{"value":0.7,"seq":8}`, `409 {"error":"task is finished","code":"task_finished","status":"completed"}`)
		if _, got := stream.updates(); !slices.Equal(got, []float64{0.1, 0.5, 0.6}) {
			t.Errorf("got values %v, want each report once", got)
		}
		time.Sleep(time.Minute)
		api.checkStatus("a", taskCompleted, "")
	})

	// A worker that creates its task may do so again when it did not get the answer.
	apiStory(t, "repeated creation", "", func(t *testing.T, api *apiFixture) {
		checkCreate := func(id, title, want string) {
			t.Helper()
			api.check("POST", "/api/tasks", `{"type":"external","params":{"task_id":"`+id+`","title":"`+title+`"}}`, want)
		}
		const (
			made  = `202 {"status":"running","stream_url":"/api/sse/tasks?task_id=a","task_id":"a"}`
			known = `200 {"task_id":"a","type":"external","status":"running","title":"t","progress":null,` +
				`"start_time":"2000-01-01T00:00:00Z","end_time":null,"result":null,"error":null,"stream_url":"/api/sse/tasks?task_id=a"}`
			taken = `409 {"error":"task_id is taken by a finished or different task","code":"task_id_taken","status":"running"}`
			ended = `409 {"error":"task_id is taken by a finished or different task","code":"task_id_taken","status":"completed"}`
		)
		checkCreate("a", "t", made)
		checkCreate("a", "t", known)
		checkCreate("a", "other", taken)
		api.follow("a").checkStory("connection_open task_started") // once
		checkCreate(api.demo(taskWaits), "", taken)
		api.post("a/complete", `{}`)
		checkCreate("a", "t", ended)
		api.do("DELETE", "/api/tasks/a", "")
		checkCreate("a", "t", made)
	})

	// Followers get each report under the ID in its answer, however many workers report at once, and nothing after the
	// end.
	apiStory(t, "many at once", "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		stream := api.follow("a")
		var mu sync.Mutex
		accepted := map[string]string{} // text by event ID
		var reporters sync.WaitGroup
		for i := range 50 {
			reporters.Go(func() {
				for j := range 15 {
					text := fmt.Sprintf("%d.%d", i, j)
					answer := api.post("a/progress", `{"value":0.5,"text":"`+text+`"}`)
					id, ok := strings.CutPrefix(answer, `200 {"event_id":"`)
					if !ok {
						return // completed
					}
					id = strings.TrimSuffix(id, `"}`)
					mu.Lock()
					if other, taken := accepted[id]; taken {
						t.Errorf("reports %s and %s both got %s", other, text, id)
					}
					accepted[id] = text
					mu.Unlock()
				}
				api.post("a/complete", `{}`)
			})
		}
		reporters.Wait()

		events := stream.events()
		got, _ := stream.updates()
		if len(got) != len(accepted) || len(events) != len(got)+4 {
			t.Fatalf("got %d events with %d reports, want %d reports and four more", len(events), len(got), len(accepted))
		}
		next := map[string]int{} // by reporter
		for n, text := range got {
			id := fmt.Sprint("e-", n+2)
			reporter, number, _ := strings.Cut(text, ".")
			if events[n+2].ID != id || accepted[id] != text || number != fmt.Sprint(next[reporter]) {
				t.Errorf("event %d: got %s with report %s, want %s with %s", n, events[n+2].ID, text, id, accepted[id])
			}
			next[reporter]++
		}
	})
}

// Some clients fail at a line of 65,536 bytes, so the data of each event must be one shorter line.
func TestEventsFitOneLine(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		checkFits := func(stream *apiStream, least int) {
			t.Helper()
			longest := 0
			for _, e := range stream.events() {
				longest = max(longest, len(e.Data))
			}
			if longest < least || longest > maxEventData {
				t.Errorf("got data of %d bytes, want from %d to %d", longest, least, maxEventData)
			}
		}
		zeros := strings.Repeat(`\u0000`, maxTaskText)
		for i, body := range []string{
			`{"result":"` + strings.Repeat("x", maxTaskResult-2) + `"}`,
			`{"error":"` + zeros + `"}`,
		} {
			id := fmt.Sprint(i, strings.Repeat("x", maxID-1))
			api.external(id)
			api.checkPost(id+"/progress", `{"text":"`+zeros+`","value":0.123456789123456789}`, `200 {"event_id":"e-2"}`)
			api.checkPost(id+[]string{"/complete", "/fail"}[i], body, `200 {"event_id":"e-3"}`)
			checkFits(api.follow(id), 6*maxTaskText)
		}
		checkFits(api.follow(api.demo(taskReturns(strings.Repeat("x", maxTaskResult-2), nil))), maxTaskResult)
		api.checkAnnounce(`{"request_id":"r","version":"1","changelog":"`+strings.Repeat("\u2028", (maxEventData-31)/6)+`"}`,
			`202 {"delivered":false,"requestId":"r","status":"queued"}`)
		checkFits(api.subscribe("r"), maxEventData-6)
		api.checkAnnounce(`{"request_id":"r","version":"1","changelog":"`+strings.Repeat("\u2028", (maxEventData-31)/6+1)+`"}`,
			`413 {"error":"version and changelog have more than 64000 bytes in JSON","code":"too_large"}`)
	})
}

// The tasks that finished first make room for others.
func TestTaskMemoryForgetsTheOldest(t *testing.T) {
	apiTest(t, "TASK_MEMORY_BYTES=1000000", func(t *testing.T, api *apiFixture) {
		api.external("running")
		result := strings.Repeat("x", 50000)
		complete := func(id string) string { return api.post(id+"/complete", `{"result":"`+result+`"}`) }
		for i := range 100 {
			id := fmt.Sprint("task-", i)
			api.external(id)
			if got := complete(id); got[:4] != "200 " || got != complete(id) {
				t.Fatalf("task %d: got %s, which is not remembered", i, got)
			}
			if got := int(api.tasks.memory.bytes.Load()); got > 1000000 {
				t.Fatalf("got %d bytes held, want the limit at most", got)
			}
		}
		fit := 1000000 / 58500 // a result takes seven pages, and the rest of its task a kilobyte
		for i := range 100 {
			got, want := api.status(fmt.Sprint("task-", i))[:3], "404"
			if i >= 100-fit {
				want = "200"
			}
			if got != want {
				t.Errorf("task %d: got %s, want %s", i, got, want)
			}
		}
		api.checkStatus("running", taskRunning, "")
	})
}

// When no task has finished, undelivered reports are dropped only for newer ones of the same task, and ends are kept.
func TestTaskMemoryOfRunningTasks(t *testing.T) {
	apiTest(t, "TASK_MEMORY_BYTES=100000", func(t *testing.T, api *apiFixture) {
		const full = `503 {"error":"tasks that have not finished hold all memory","code":"memory_full"}`
		api.external("a", "b")
		text := strings.Repeat("x", 1000)
		for n := range 200 {
			if got := api.post("a/progress", fmt.Sprintf(`{"text":"%d %s","value":0.5}`, n, text)); got != fmt.Sprintf(`200 {"event_id":"e-%d"}`, n+2) {
				t.Fatalf("report %d: got %s", n, got)
			}
			if got := int(api.tasks.memory.bytes.Load()); got > 100000 {
				t.Fatalf("got %d bytes held, want the limit at most", got)
			}
		}
		api.check("POST", "/api/tasks", `{"type":"external"}`, full)
		api.check("POST", "/api/tasks", `{"type":"demo"}`, full)
		stream := api.follow("a")
		texts, _ := stream.updates()
		if n := len(texts); n < 60 || n > 80 || texts[n-1] != "199 "+text || !strings.HasPrefix(stream.story(), "connection_open task_started progress_update") {
			t.Errorf("got %d reports up to %.10q, want the first event and the newest reports", n, texts[n-1])
		}
		api.post("b/progress", `{"text":"first `+text+`"}`)
		api.post("b/progress", `{"text":"only `+text+`"}`)
		if texts, _ := api.follow("b").updates(); !slices.Equal(texts, []string{"only " + text}) {
			t.Errorf("the other task: got %q, want its own report", texts)
		}
		api.wantMetric(`sse_outbox_dropped_total{service="task",reason="limit"}`, float64(201-len(texts)))
		api.checkPost("b/complete", `{"result":"`+strings.Repeat("x", 60000)+`"}`, `200 {"event_id":"e-4"}`)
		api.follow("b").checkStory("connection_open task_started task_completed connection_close:task_completed")
		api.checkStatus("b", taskCompleted, "")
		api.external("c") // b is forgotten to make room
		api.checkGone("b")
	})
}

// The bound holds only if the bytes counted match those on the heap.
func TestTaskMemoryIsCounted(t *testing.T) {
	if !alone(t) {
		return
	}
	const tasks = 1500 // the map, which grows in steps, is three quarters full then
	external, x := `{"type":"external","params":{"task_id":"ID"}}`, strings.Repeat("x", 12<<10)
	for _, tt := range []struct {
		name, start string
		steps       []string // of each task
	}{
		{"external", external, nil},
		{"title", `{"type":"external","params":{"task_id":"ID","title":"` + x[:200] + `"}}`, nil},
		{"progress", external, []string{`progress {"text":"21 of 42 rows","value":0.5}`, `progress {"value":0.75}`}},
		{"long progress", external, []string{`progress {"text":"` + x[:3000] + `"}`, `progress {"value":0.75}`}},
		{"small result", external, []string{`progress {"text":"21 of 42 rows","value":0.5}`, `complete {"result":42}`}},
		{"large result", external, []string{`complete {"result":"` + x[:9000] + `","more":"` + x + `"}`}},
		{"failure", external, []string{`fail {"error":"` + x + `"}`}},
		{"pending", `{"type":"demo","params":{"message":"` + x[:2000] + `"}}`, nil},
		{"run here", `{"type":"failing","params":{"delay":0,"error_message":"no luck"}}`, nil},
	} {
		synctest.Test(t, func(t *testing.T) { // the timers go with the bubble
			api := newAPI(t, "TASK_MEMORY_BYTES=1000000000 TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=10000")
			api.tasks.log = slog.New(slog.DiscardHandler)
			if tt.name == "pending" {
				api.demo(taskWaits)
				api.tasks.kinds["demo"] = demoTask
			}
			before := heapInUse()
			for range tasks {
				id := newToken()
				api.start(strings.Replace(tt.start, "ID", id, 1))
				for _, step := range tt.steps {
					route, body, _ := strings.Cut(step, " ")
					if w := api.request("POST", "/api/tasks/"+id+"/"+route, body); w.Code != http.StatusOK {
						t.Fatalf("%s: got %d %s", tt.name, w.Code, w.Body)
					}
				}
			}
			if tt.name == "run here" {
				eventually(t, patience, "all have failed", func() bool { return api.tasks.Counts()["failed"] == tasks })
			}
			synctest.Wait()
			checkCounted(t, tt.name, tasks, int(api.tasks.memory.bytes.Load()), before)
			runtime.KeepAlive(api)
		})
	}
}

func TestExternalTimeout(t *testing.T) {
	apiStory(t, "worker lost", "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("silent", "invalid", "a")
		for range 5 { // in all longer than the timeout
			time.Sleep(9 * time.Second)
			api.post("a/progress", `{"value":0}`)
			api.post("invalid/progress", `{"value":"half"}`)
		}
		api.checkStatus("silent", taskFailed, "worker lost")
		api.checkStatus("invalid", taskFailed, "worker lost") // a refused report is not a sign of life
		time.Sleep(10*time.Second - time.Nanosecond)
		api.checkStatus("a", taskRunning, "")
		time.Sleep(time.Nanosecond)
		api.checkStatus("a", taskFailed, "worker lost")
		api.checkPost("a/progress", `{"value":0}`, `409 {"error":"task is finished","code":"task_finished","status":"failed"}`)
	})

	// An accepted report keeps the task alive, even when its timer has fired and waits for the lock.
	apiStory(t, "report at the last moment", "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
		accepted := 0
		for range 300 {
			id := api.start(`{"type":"external"}`)
			time.Sleep(10 * time.Second)
			if strings.HasPrefix(api.post(id+"/progress", `{"value":0}`), "200 ") {
				accepted++
				api.checkStatus(id, taskRunning, "")
				time.Sleep(10 * time.Second)
			}
			api.checkStatus(id, taskFailed, "worker lost")
		}
		if accepted == 0 || accepted == 300 {
			t.Errorf("got %d of 300 reports accepted, want some but not all, or this was no race", accepted)
		}
	})
}

// Everything that can end a task does so at the same instant. Whichever wins, followers see one end, and the other
// calls fail.
func TestTaskEndingsRace(t *testing.T) {
	const timeout = time.Second
	stories := regexp.MustCompile(`^connection_open task_started( progress_update)* task_(completed|failed|cancelled) connection_close:task_(\w+)$`)
	for kind, start := range map[string]func(*apiFixture) string{
		"external": func(api *apiFixture) string { return api.start(`{"type":"external"}`) },
		"ours":     func(api *apiFixture) string { return api.demo(taskSleeps(timeout)) },
	} {
		t.Run(kind, func(t *testing.T) {
			apiTest(t, "TASK_TIMEOUT_SECONDS=1", func(t *testing.T, api *apiFixture) {
				ends := map[string]int{}
				for range 300 {
					id := start(api)
					stream := api.follow(id)
					var accepted [3]string
					for i, body := range []string{`{"result":1}`, `{"error":"x"}`, ``} {
						action := []string{"complete", "fail", "cancel"}[i]
						go func() {
							time.Sleep(timeout)
							accepted[i] = api.post(id+"/"+action, body)[:3]
						}()
					}
					go func() {
						time.Sleep(timeout)
						api.post(id+"/progress", `{"value":1}`)
						api.do("DELETE", "/api/tasks/"+id, "")
					}()
					time.Sleep(2 * timeout) // a last report may have put off the timeout
					got := stream.story()
					m := stories.FindStringSubmatch(got)
					if m == nil || m[2] != m[3] {
						t.Fatalf("got %s, want one end", got)
					}
					winners := strings.Count(strings.Join(accepted[:], " "), "200")
					if winners > 1 || m[2] == "cancelled" && winners == 0 {
						t.Fatalf("got answers %v and %s, want one 200 at most", accepted, got)
					}
					ends[m[2]]++
				}
				if len(ends) != 3 {
					t.Errorf("got ends %v, want all three or this was no race", ends)
				}
			})
		})
	}
}
