package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
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

// external makes an external task with an ID of our choice.
func (api *apiFixture) external(id string) {
	api.t.Helper()
	api.start(fmt.Sprintf(`{"type":"external","params":{"task_id":%q}}`, id))
}

// demo makes a task that does this work, and returns its ID.
func (api *apiFixture) demo(work taskFunc) (id string) {
	api.t.Helper()
	api.tasks.kinds["demo"] = func(object) (taskFunc, error) { return work, nil }
	return api.start(`{"type":"demo"}`)
}

// taskReturns is work that is done at once.
func taskReturns(result any, err error) taskFunc {
	return func(context.Context, *progress) (any, error) { return result, err }
}

// taskWaits works until it is told to stop.
func taskWaits(ctx context.Context, _ *progress) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// taskSleeps works for some time and hears nothing.
func taskSleeps(d time.Duration) taskFunc {
	return func(context.Context, *progress) (any, error) {
		time.Sleep(d)
		return "slept", nil
	}
}

// post posts to one of the routes of a task: "a/cancel".
func (api *apiFixture) post(route, body string) string {
	return api.do("POST", "/api/tasks/"+route, body)
}

// checkPost posts to one of the routes of a task and wants this answer.
func (api *apiFixture) checkPost(route, body, want string) {
	api.t.Helper()
	api.check("POST", "/api/tasks/"+route, body, want)
}

// status is the status of a task, in one line.
func (api *apiFixture) status(id string) string {
	api.settle()
	return api.do("GET", "/api/tasks/"+id+"/status", "")
}

// checkStatus wants that status of a task, and that error unless it is "".
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
		var event struct {
			EventType string `json:"event_type"`
			Data      struct {
				Text  string
				Value float64
			}
		}
		if json.Unmarshal([]byte(e.Data), &event) == nil && event.EventType == "progress_update" {
			texts, values = append(texts, event.Data.Text), append(values, event.Data.Value)
		}
	}
	return texts, values
}

// Every event of a task, as the browser gets it.
func TestTaskEvents(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
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
		if got := stream.text(); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
		if got := api.follow(id).text(); got != want {
			t.Errorf("page loaded again: got\n%s\nwant\n%s", got, want)
		}
		resumed := api.connect("/api/sse/tasks?task_id="+id, "e-3")
		resumed.checkStory("connection_open task_completed connection_close:task_completed")
	})
}

func TestTaskUnknownOnConnect(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		want := ` connection_open {"status":"connected"}
 error {"error":"Task not found","task_id":"a\"b"}
close connection_close {"reason":"task_not_found"}
`
		if got := api.connect("/api/sse/tasks?task_id=a%22b", "e-7").text(); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}

// A task is made, and followed, while an older request for the same ID is
// told that there is none. That must not replace the newer stream.
func TestTaskUnknownReplacesNoNewerStream(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.conns.gateway = senderFunc(func(events []event) sendResult { return sendResult{taken: len(events)} })
	for n := range 1000 {
		id := fmt.Sprint(n)
		var requests sync.WaitGroup
		requests.Go(func() { api.tasks.OnConnect(id, connectRequest{token: "old " + id, order: parseOrder("g-1")}) })
		requests.Go(func() {
			api.tasks.Start(externalTask, object{"task_id": marshal(id)})
			api.tasks.OnConnect(id, connectRequest{token: "new " + id, order: parseOrder("g-2")})
		})
		requests.Wait()
		if api.conns.tokens["new "+id] == "" {
			t.Fatalf("task %s: the older stream replaced the newer", id)
		}
	}
}

// taskBrokenResult and taskBrokenError panic when one wants to know more. That
// happens after the work is done, and must not end the whole process.
type taskBrokenResult struct{}

func (taskBrokenResult) MarshalJSON() ([]byte, error) { panic("broken") }

type taskBrokenError struct{ text string }

func (e *taskBrokenError) Error() string { return e.text } // panics for nil

// However a task ends, there is one terminal event, and what comes after it is
// too late to change anything.
func TestTaskEndsOnce(t *testing.T) {
	cancel := func(api *apiFixture, id string) { api.post(id+"/cancel", "") }
	closes := func(api *apiFixture, id string) { api.tasks.Close() }
	panics := func(context.Context, *progress) (any, error) { panic("a detail") }
	exits := func(context.Context, *progress) (any, error) { runtime.Goexit(); return nil, nil }
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
				if got := api.metric(`task_executions_total{type="demo",status="` + string(tt.want) + `"}`); got != 1 {
					t.Errorf("got %v executions that %s, want 1", got, tt.want)
				}
			})
		})
	}
}

// Whoever debugs a panic needs its value and stack; the browser must see
// neither.
func TestTaskPanicIsLogged(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		stream := api.follow(api.demo(func(context.Context, *progress) (any, error) { panic("a detail") }))
		if got := stream.text(); strings.Contains(got, "a detail") {
			t.Errorf("the stream shows the panic:\n%s", got)
		}
		if log := api.logged.String(); !strings.Contains(log, `panic="a detail"`) || !strings.Contains(log, "tasks_test.go") {
			t.Errorf("the log lacks value or stack:\n%s", log)
		}
	})
}

func TestTaskPendingEndsOnce(t *testing.T) {
	apiTest(t, "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
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

// A worker is busy until its work returns, also when the task has ended
// before: otherwise deaf work would pile up without a limit.
func TestTaskWorkerIsBusyUntilWorkReturns(t *testing.T) {
	apiTest(t, "TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=0", func(t *testing.T, api *apiFixture) {
		api.post(api.demo(taskSleeps(time.Minute))+"/cancel", "")
		api.check("POST", "/api/tasks", `{"type":"demo"}`, `503 {"error":"task queue is full","code":"queue_full"}`)
		time.Sleep(time.Minute)
		api.settle()
		api.checkStatus(api.demo(taskWaits), taskRunning, "")
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
			`{"type":"demo","params":{"steps":1,"steps":1}}`:                noParams,
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
			`{"type":"external","params":{"task_id":""}}`:                   errBadID.Error(),
			`{"type":"external","params":{"task_id":"a:b"}}`:                errBadID.Error(),
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

func TestTaskStartAnswer(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.check("POST", "/api/tasks", `{"type":"external","params":{"task_id":"a/b c"}}`,
			`202 {"status":"pending","stream_url":"/api/sse/tasks?task_id=a%2Fb+c","task_id":"a/b c"}`)
		api.connect("/api/sse/tasks?task_id=a%2Fb+c").checkStory("connection_open task_started")
	})
}

func TestTaskFailing(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		id := api.start(`{"type":"failing","params":{"delay":5,"error_message":"on purpose"}}`)
		plain := api.start(`{"type":"failing"}`)
		time.Sleep(4 * time.Second)
		api.checkStatus(id, taskRunning, "")
		time.Sleep(time.Second)
		api.checkStatus(id, taskFailed, "on purpose")
		api.checkStatus(plain, taskFailed, "task failed")
	})
}

func TestTaskProgressNeverFalls(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		reported := []float64{-1, math.NaN(), 0.25, 0.125, math.Inf(-1), 0.5, math.NaN(), 2, math.Inf(1), 0}
		_, got := api.follow(api.demo(func(_ context.Context, p *progress) (any, error) {
			for _, value := range reported {
				p.Report("", value)
			}
			return nil, nil
		})).updates()
		if want := []float64{0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 1, 1, 1}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// Work that goes on after the end of its task has nothing more to say.
func TestTaskProgressAfterTheEnd(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		id := api.demo(func(ctx context.Context, p *progress) (any, error) {
			<-ctx.Done()
			p.Report("too late", 1)
			return nil, nil
		})
		stream := api.follow(id)
		api.post(id+"/cancel", "")
		stream.checkStory("connection_open task_started task_cancelled connection_close:task_cancelled")
	})
}

func TestTaskTextIsCutBetweenCharacters(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		fits, long := strings.Repeat("é", maxTaskText/2), "x"+strings.Repeat("é", maxTaskText/2)
		cut := long[:maxTaskText-1]
		id := api.demo(func(_ context.Context, p *progress) (any, error) {
			p.Report(fits, 0)
			p.Report(long, 0)
			return nil, errors.New(long)
		})
		if got, _ := api.follow(id).updates(); !slices.Equal(got, []string{fits, cut}) {
			t.Errorf("got texts %.20q, want the first whole and the second without its last character", got)
		}
		api.checkStatus(id, taskFailed, cut)
	})
}

// A text that has no character in it at all has no place to cut it either.
func TestTaskTextThatIsNoUTF8(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		noText := strings.Repeat("\x80", maxTaskText+1)
		id := api.demo(func(_ context.Context, p *progress) (any, error) {
			p.Report(noText, 0)
			p.Report("caf\xe9", 0)
			return nil, errors.New(noText)
		})
		if got, _ := api.follow(id).updates(); !slices.Equal(got, []string{"", "caf"}) {
			t.Errorf("got texts %q, want what is UTF-8", got)
		}
		api.checkStatus(id, taskFailed, "task failed")
	})
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
			{fits + "x", taskFailed, "result is larger than 65536 bytes"},
			{make(chan int), taskFailed, "result has no JSON form"},
			{math.NaN(), taskFailed, "result has no JSON form"},
		} {
			api.checkStatus(api.demo(taskReturns(tt.result, nil)), tt.want, tt.wantError)
		}
		api.external("a")
		api.checkPost("a/complete", `{"result":"`+fits+`x"}`, `413 {"error":"result is larger than 65536 bytes","code":"too_large"}`)
		api.checkStatus("a", taskRunning, "")
		api.checkPost("a/complete", `{"result":"`+fits+`"}`, `200 {"event_id":"e-2"}`)
	})
}

// What a worker sends beside the result is not kept. Not parallel, for it looks at the heap.
func TestTaskResultIsAllThatIsKept(t *testing.T) {
	const tasks = 100
	api := newAPI(t, "")
	before := heapInUse()
	for i := range tasks {
		id := fmt.Sprint("task-", i)
		api.external(id)
		w := api.request("POST", "/api/tasks/"+id+"/complete", `{"result":1,"more":"`+strings.Repeat("x", 200<<10)+`"}`)
		if w.Code != 200 {
			t.Fatalf("got %d %s", w.Code, w.Body)
		}
	}
	if got := int64(heapInUse()-before) / tasks; got > 20<<10 {
		t.Errorf("a task with the result 1 keeps %d bytes", got)
	}
	runtime.KeepAlive(api)
}

func TestTaskStatus(t *testing.T) {
	apiTest(t, "TASK_MAX_WORKERS=1", func(t *testing.T, api *apiFixture) {
		for _, id := range []string{"running", "completed", "failed", "cancelled"} {
			api.external(id)
		}
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
		for id, want := range map[string]string{
			pending:     `"type":"demo","status":"pending","start_time":null,"end_time":null,"result":null,"error":null`,
			"running":   `"type":"external","status":"running",` + runs + `,"result":null,"error":null`,
			"completed": `"type":"external","status":"completed",` + ran + `,"result":{"n":[1,null]},"error":null`,
			"failed":    `"type":"external","status":"failed",` + ran + `,"result":null,"error":"no luck"`,
			"cancelled": `"type":"external","status":"cancelled",` + ran + `,"result":null,"error":null`,
		} {
			if got, want := api.status(id), `200 {"task_id":"`+id+`",`+want+`}`; got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		}
		if got, want := api.status("unknown"), `404 {"error":"task not found","code":"task_not_found"}`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

func TestTaskListNewestFirst(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		var want []string
		for i := range maxTaskList + 5 { // all in the same instant
			want = append(want, fmt.Sprint("task-", i))
			api.external(want[i])
		}
		slices.Reverse(want)
		var list struct{ Tasks []taskView }
		if err := json.Unmarshal(api.request("GET", "/api/tasks", "").Body.Bytes(), &list); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, task := range list.Tasks {
			got = append(got, task.TaskID)
		}
		if !slices.Equal(got, want[:maxTaskList]) {
			t.Errorf("got %v\nwant %v", got, want[:maxTaskList])
		}
	})
}

func TestTaskCancelAndDelete(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.checkPost("unknown/cancel", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("DELETE", "/api/tasks/unknown", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("DELETE", "/api/tasks/a", "", `404 {"error":"task is not finished","code":"task_not_finished"}`)
		api.checkPost("a/cancel", "", `200 {"message":"task cancelled","success":true}`)
		api.checkPost("a/cancel", "", `404 {"error":"task is already finished","code":"task_finished"}`)
		api.check("DELETE", "/api/tasks/a", "", `200 {"message":"task deleted","success":true}`)
		api.check("DELETE", "/api/tasks/a", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("GET", "/api/tasks/a/status", "", `404 {"error":"task not found","code":"task_not_found"}`)
		api.check("GET", "/api/tasks", "", `200 {"tasks":[]}`)
	})
}

func TestTaskIsRememberedForAWhile(t *testing.T) {
	apiTest(t, "TASK_CLEANUP_INTERVAL_SECONDS=10 TASK_TIMEOUT_SECONDS=1000", func(t *testing.T, api *apiFixture) {
		api.external("a")
		time.Sleep(time.Minute) // running tasks are remembered for as long as it takes
		api.post("a/complete", `{}`)
		time.Sleep(10*time.Second - time.Nanosecond)
		api.checkStatus("a", taskCompleted, "")
		time.Sleep(time.Nanosecond)
		if got, want := api.status("a"), `404 {"error":"task not found","code":"task_not_found"}`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// A browser of the first task may come back to the second one. What it had
// are not the events that have the same numbers now.
func TestTaskSuccessorIsFollowedFromItsStart(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.tasks.policy.epoch = newEpoch
		api.external("a")
		first := api.follow("a")
		first.leave()
		api.post("a/cancel", "")
		api.do("DELETE", "/api/tasks/a", "")
		api.external("a")
		resumed := api.connect("/api/sse/tasks?task_id=a", first.lastID())
		resumed.checkStory("connection_open task_started")
	})
}

// The timer that forgets a task must not forget another one that got its ID
// in the meantime.
func TestTaskSuccessorIsNotForgotten(t *testing.T) {
	apiTest(t, "TASK_CLEANUP_INTERVAL_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.post("a/cancel", "")
		api.do("DELETE", "/api/tasks/a", "")
		api.external("a")
		time.Sleep(time.Minute)
		api.checkStatus("a", taskRunning, "")
	})
}

// A task that is deleted has long to go until it would be forgotten. Nothing may keep it in memory.
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

func TestExternalTask(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		stream := api.follow("a")
		api.checkPost("a/progress", `{"value":0.25}`, `200 {"event_id":"e-2"}`)
		api.checkPost("a/progress", `{"text":"half","value":0.5}`, `200 {"event_id":"e-3"}`)
		api.checkPost("a/complete", `{"result": [1, "<2>"]}`, `200 {"event_id":"e-4"}`)
		head := `","task_id":"a","timestamp":"2000-01-01T00:00:00Z","data":`
		want := `e-0 connection_open {"status":"connected"}
e-1 task_event {"event_type":"task_started` + head + `null}
e-2 task_event {"event_type":"progress_update` + head + `{"text":"","value":0.25}}
e-3 task_event {"event_type":"progress_update` + head + `{"text":"half","value":0.5}}
e-4 task_event {"event_type":"task_completed` + head + `[1,"<2>"]}
close connection_close {"reason":"task_completed"}
`
		if got := stream.text(); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}

func TestExternalTaskFails(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		stream := api.follow("a")
		api.checkPost("a/fail", `{"error":"no \"luck\""}`, `200 {"event_id":"e-2"}`)
		want := `e-2 task_event {"event_type":"task_failed","task_id":"a","timestamp":"2000-01-01T00:00:00Z","data":{"error":"no \"luck\""}}
close connection_close {"reason":"task_failed"}
`
		if got := stream.text(); !strings.HasSuffix(got, want) {
			t.Errorf("got\n%s\nwant at the end\n%s", got, want)
		}
	})
}

// A report that comes too early, too late or to the wrong task is refused and
// changes nothing.
func TestExternalReportsRefused(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		ours := api.demo(taskWaits)
		for _, id := range []string{"completed", "failed", "cancelled"} {
			api.external(id)
		}
		api.post("completed/complete", `{"result":1}`)
		api.post("failed/fail", `{"error":"no luck"}`)
		api.post("cancelled/cancel", "")
		before := api.do("GET", "/api/tasks", "")
		for id, want := range map[string]string{
			"unknown":   `404 {"error":"task not found","code":"task_not_found"}`,
			ours:        `409 {"error":"task is not external","code":"not_external"}`,
			"completed": `409 {"error":"task is finished","code":"task_finished"}`,
			"failed":    `409 {"error":"task is finished","code":"task_finished"}`,
			"cancelled": `409 {"error":"task cancelled","code":"task_cancelled"}`,
		} {
			api.checkPost(id+"/progress", `{"text":"x","value":1}`, want)
			api.checkPost(id+"/complete", `{"result":2}`, want)
			api.checkPost(id+"/fail", `{"error":"x"}`, want)
		}
		api.check("GET", "/api/tasks", "", before)
		api.follow("cancelled").checkStory("connection_open task_started task_cancelled connection_close:task_cancelled")
	})
}

func TestExternalReportBodies(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		long := strings.Repeat("x", maxTaskText+1)
		const (
			noObject = `400 {"error":"body must be one JSON object","code":"not_json"}`
			badValue = `400 {"error":"value must be a number","code":"bad_value"}`
			badText  = `400 {"error":"text must be a string of at most 8192 bytes","code":"bad_params"}`
			badError = `400 {"error":"error must be a string of 1 to 8192 bytes","code":"bad_params"}`
		)
		api.checkPost("a/progress", `{}`, badValue)
		api.checkPost("a/progress", `{"value":null}`, badValue)
		api.checkPost("a/progress", `{"value":"1"}`, badValue)
		api.checkPost("a/progress", `{"value":1e999}`, badValue)
		api.checkPost("a/progress", `{"text":1,"value":1}`, badText)
		api.checkPost("a/progress", `{"text":"`+long+`","value":1}`, badText)
		api.checkPost("a/progress", ``, noObject)
		api.checkPost("a/complete", `null`, noObject)
		api.checkPost("a/complete", strings.Repeat(" ", maxTaskBody)+`{}`, `413 {"error":"request body too large","code":"too_large"}`)
		api.checkPost("a/fail", `{}`, badError)
		api.checkPost("a/fail", `{"error":""}`, badError)
		api.checkPost("a/fail", `{"error":null}`, badError)
		api.checkPost("a/fail", `{"error":"`+long+`"}`, badError)
		api.follow("a").checkStory("connection_open task_started")
	})
}

func TestExternalWorkerLost(t *testing.T) {
	apiTest(t, "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("silent")
		api.external("a")
		for range 5 { // for longer than the timeout in all
			time.Sleep(9 * time.Second)
			api.post("a/progress", `{"value":0}`)
		}
		api.checkStatus("silent", taskFailed, "worker lost")
		time.Sleep(10*time.Second - time.Nanosecond)
		api.checkStatus("a", taskRunning, "")
		time.Sleep(time.Nanosecond)
		api.checkStatus("a", taskFailed, "worker lost")
		api.checkPost("a/progress", `{"value":0}`, `409 {"error":"task is finished","code":"task_finished"}`)
	})
}

// A report that is accepted keeps the task alive, even in the instant in which
// its time is over and the timer already waits for the lock.
func TestExternalReportAtTheLastMoment(t *testing.T) {
	apiTest(t, "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
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
			t.Errorf("got %d of 300 reports accepted, want some or this was no race", accepted)
		}
	})
}

// A report that is refused is no sign of life: a worker that only sends
// rubbish is lost all the same.
func TestExternalBadReportsAreSilence(t *testing.T) {
	apiTest(t, "TASK_TIMEOUT_SECONDS=10", func(t *testing.T, api *apiFixture) {
		api.external("a")
		time.Sleep(9 * time.Second)
		api.post("a/progress", `{"value":"half"}`)
		time.Sleep(time.Second)
		api.checkStatus("a", taskFailed, "worker lost")
	})
}

// A worker that creates its task may do so again when it did not get the
// answer.
func TestExternalCreationIsIdempotent(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		checkCreate := func(id, title, want string) {
			t.Helper()
			api.check("POST", "/api/tasks", `{"type":"external","params":{"task_id":"`+id+`","title":"`+title+`"}}`, want)
		}
		const (
			made  = `202 {"status":"pending","stream_url":"/api/sse/tasks?task_id=a","task_id":"a"}`
			known = `200 {"task_id":"a","type":"external","status":"running","start_time":"2000-01-01T00:00:00Z","end_time":null,` +
				`"result":null,"error":null,"stream_url":"/api/sse/tasks?task_id=a"}`
			taken = `409 {"error":"task_id is taken by a finished or different task","code":"task_id_taken"}`
		)
		checkCreate("a", "t", made)
		checkCreate("a", "t", known)
		checkCreate("a", "other", taken)
		api.follow("a").checkStory("connection_open task_started") // once
		checkCreate(api.demo(taskWaits), "", taken)
		api.post("a/complete", `{}`)
		checkCreate("a", "t", taken)
		api.do("DELETE", "/api/tasks/a", "")
		checkCreate("a", "t", made)
	})
}

func TestExternalTakesNoWorker(t *testing.T) {
	apiTest(t, "TASK_MAX_WORKERS=1 TASK_QUEUE_LIMIT=0", func(t *testing.T, api *apiFixture) {
		for _, id := range []string{"a", "b", "c"} {
			api.external(id)
		}
		api.checkStatus(api.demo(taskWaits), taskRunning, "")
		api.external("d")
		api.checkStatus("d", taskRunning, "")
	})
}

// All that can end a task does so in the same instant, over and over.
// Whichever wins, its followers see one end and the losers are told.
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
					time.Sleep(2 * timeout) // also for the worker that was lost after a last report
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

// What a worker is told in the answer to its report is where the followers
// get it, however many report at once, and nothing follows the end.
func TestExternalConcurrentReporters(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
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
