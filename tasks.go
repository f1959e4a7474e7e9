// TaskService: workers and the life cycle of a task. Tokens are not known here;
// outbox.go delivers the events, taskapi.go speaks HTTP, kinds.go has the work.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxTaskBody   = 256 << 10 // bytes of a request body
	maxTaskText   = 8 << 10   // bytes of a progress text, a title or an error
	maxTaskResult = 64 << 10  // bytes of an encoded result
	maxTaskList   = 100       // tasks in a list
	maxExternal   = 10000     // external tasks that have not ended
)

// taskStatus is where a task is in its life: pending, running, then one of
// the others for good.
type taskStatus string

const (
	taskPending   taskStatus = "pending"
	taskRunning   taskStatus = "running"
	taskCompleted taskStatus = "completed"
	taskFailed    taskStatus = "failed"
	taskCancelled taskStatus = "cancelled"
)

func (s taskStatus) finished() bool { return s != taskPending && s != taskRunning }

// taskConfig are the limits of a TaskService.
type taskConfig struct {
	workers    int           // tasks that run at once
	queueLimit int           // tasks that wait for a worker
	timeout    time.Duration // a task that runs for longer fails
	remember   time.Duration // how long a finished task is kept
	eventLimit int           // events kept for each task
}

// taskMetrics is what a TaskService tells of its work.
type taskMetrics interface {
	RecordOutboxDropped(service, reason string, n int)
	RecordTask(kind, status string, seconds float64)
}

// TaskService runs tasks, or follows those that others run, and tells their
// followers.
//
// Lock order: mu, then that of an event log.
type TaskService struct {
	cfg     taskConfig
	conns   *ConnectionManager
	log     *slog.Logger
	met     taskMetrics
	kinds   map[string]taskKind
	policy  *logPolicy // of the logs of tasks
	unknown *logPolicy // of streams for tasks that are not known

	mu      sync.Mutex // guards the rest and the mutable part of each task
	tasks   map[string]*task
	queue   []*task                // pending, oldest first, at most cfg.queueLimit
	running int                    // busy workers
	outside int                    // external tasks that have not ended, at most maxExternal
	created uint64                 // tasks ever made
	watched map[string][]*follower // pages that follow a task that is not known, by its ID
	closing bool                   // no new tasks
}

// task is one task. Its terminal event is in the outbox if and only if its
// status is a finished one.
type task struct {
	id     string
	kind   string
	work   taskFunc // nil: external
	title  string   // of an external task
	number uint64   // of creation
	outbox *eventLog

	status   taskStatus
	value    float64
	start    time.Time // zero before it runs
	end      time.Time // zero before it finished
	result   json.RawMessage
	err      string
	cancel   context.CancelFunc // of work's context; nil before it runs, and if external
	seen     time.Time          // start, or the last report from outside
	deadline *time.Timer        // fails the task, later forgets it; nil while it is pending
}

var (
	errTaskUnknown   = newError(http.StatusNotFound, "task_not_found", "task not found")
	errCannotCancel  = newError(http.StatusNotFound, "task_finished", "task is already finished")
	errCannotDelete  = newError(http.StatusNotFound, "task_not_finished", "task is not finished")
	errTaskFinished  = newError(http.StatusConflict, "task_finished", "task is finished")
	errTaskCancelled = newError(http.StatusConflict, "task_cancelled", "task cancelled")
	errNotExternal   = newError(http.StatusConflict, "not_external", "task is not external")
	errTaskIDTaken   = newError(http.StatusConflict, "task_id_taken", "task_id is taken by a finished or different task")
	errTaskKind      = badRequest("unknown_type", "unknown task type")
	errQueueFull     = newError(http.StatusServiceUnavailable, "queue_full", "task queue is full")
)

func newTaskService(cfg taskConfig, conns *ConnectionManager, log *slog.Logger, met taskMetrics) *TaskService {
	return &TaskService{
		cfg:   cfg,
		conns: conns,
		log:   log,
		met:   met,
		kinds: taskKinds(),
		policy: &logPolicy{
			event:   "task_event",
			epoch:   newEpoch,
			replay:  true,
			limit:   cfg.eventLimit,
			dropped: func(n int) { met.RecordOutboxDropped(serviceTask, "limit", n) },
		},
		unknown: &logPolicy{event: "error", replay: true},
		tasks:   map[string]*task{},
		watched: map[string][]*follower{},
	}
}

// OnConnect lets a stream follow a task. Somebody who asks for a task that is
// not known is told so on the stream, which then ends.
func (s *TaskService) OnConnect(id string, c connectRequest) (open event, end bool, err error) {
	identifier, err := newIdentifier(serviceTask, id)
	if err != nil {
		return event{}, false, err
	}
	s.mu.Lock()
	t := s.tasks[id]
	s.mu.Unlock()
	if t != nil {
		return follow(s.conns, identifier, c, t.outbox)
	}
	log := newEventLog(s.unknown)
	log.Append(taskNotFound(id), true)
	log.End("task_not_found")
	return follow(s.conns, identifier, c, log)
}

// maxFollowers is how many connections may follow one task.
const maxFollowers = 10_000

// crowded reports whether one of these tasks has as many followers as it may.
func (s *TaskService) crowded(ids []string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(ids, func(id string) bool {
		t := s.tasks[id]
		return t != nil && t.outbox.Followers() >= maxFollowers || len(s.watched[id]) >= maxFollowers
	})
}

// watch returns the logs of tasks for a page, with a log that tells it of those
// that are not known. If one of these is made, the page is given its log, until
// unwatch.
func (s *TaskService) watch(ids []string, page *follower) []*eventLog {
	s.mu.Lock()
	defer s.mu.Unlock()
	unknown := newEventLog(s.unknown)
	logs := []*eventLog{unknown}
	for _, id := range ids {
		if t := s.tasks[id]; t != nil {
			logs = append(logs, t.outbox)
			continue
		}
		unknown.Append(taskNotFound(id), true)
		s.watched[id] = append(s.watched[id], page)
	}
	return logs
}

// unwatch ends what watch began.
func (s *TaskService) unwatch(ids []string, page *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.watched[id] = slices.DeleteFunc(s.watched[id], func(other *follower) bool { return other == page })
		if len(s.watched[id]) == 0 {
			delete(s.watched, id)
		}
	}
}

// taskNotFound is the data of an error event.
func taskNotFound(id string) string {
	return string(marshal(map[string]string{"error": "Task not found", "task_id": id}))
}

// Start makes a task. One that runs here starts as soon as a worker is free;
// an external one has started. An external task whose task_id names one that
// was made the same way is that one, and known is true.
func (s *TaskService) Start(kind string, params object) (t *task, known bool, err error) {
	if kind == externalTask {
		return s.startExternal(params)
	}
	makeWork, ok := s.kinds[kind]
	if !ok {
		return nil, false, errTaskKind
	}
	work, err := makeWork(params)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return nil, false, errClosing
	case s.running >= s.cfg.workers && len(s.queue) >= s.cfg.queueLimit:
		return nil, false, errQueueFull
	}
	t = s.addLocked(newToken(), kind)
	t.work = work
	s.queue = append(s.queue, t)
	s.dispatchLocked()
	return t, false, nil
}

func (s *TaskService) startExternal(params object) (t *task, known bool, err error) {
	id, title, err := externalParams(params)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, false, errClosing
	}
	if t = s.tasks[id]; t != nil {
		if t.kind != externalTask || t.title != title || t.status.finished() {
			return nil, false, errTaskIDTaken
		}
		return t, true, nil
	}
	if s.outside >= maxExternal {
		return nil, false, errQueueFull
	}
	s.outside++
	t = s.addLocked(id, externalTask)
	t.title = title
	s.runLocked(t, "worker lost")
	return t, false, nil
}

func (s *TaskService) addLocked(id, kind string) *task {
	s.created++
	t := &task{
		id:     id,
		kind:   kind,
		number: s.created,
		status: taskPending,
		outbox: newEventLog(s.policy),
	}
	s.tasks[id] = t
	for _, page := range s.watched[id] {
		page.add(t.outbox)
	}
	delete(s.watched, id)
	return t
}

// dispatchLocked gives waiting tasks to free workers.
func (s *TaskService) dispatchLocked() {
	for s.running < s.cfg.workers && len(s.queue) > 0 {
		t := s.queue[0]
		s.queue = slices.Delete(s.queue, 0, 1)
		s.running++
		ctx, cancel := context.WithCancel(context.Background())
		t.cancel = cancel
		s.runLocked(t, "timed out")
		go s.run(ctx, t)
	}
}

// runLocked makes t a running task, which fails with the text late when
// nothing was seen of it for the timeout.
func (s *TaskService) runLocked(t *task, late string) {
	t.status, t.start = taskRunning, time.Now()
	t.seen = t.start
	t.deadline = time.AfterFunc(s.cfg.timeout, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if time.Since(t.seen) >= s.cfg.timeout { // not if a report came while this waited
			s.finishLocked(t, taskFailed, nil, late)
		}
	})
	s.emitLocked(t, "task_started", nil, true)
}

// run does the work of t on a worker.
func (s *TaskService) run(ctx context.Context, t *task) {
	var result json.RawMessage
	failure := "internal error" // unless work gets to return
	defer func() {
		if v := recover(); v != nil {
			s.log.Error("task panicked", "task_id", t.id, "type", t.kind, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if failure != "" {
			s.finishLocked(t, taskFailed, nil, failure)
		} else {
			s.finishLocked(t, taskCompleted, result, "")
		}
		s.running--
		s.dispatchLocked()
	}()
	value, err := t.work(ctx, &progress{s, t})
	if err == nil {
		result, err = encodeResult(value)
	}
	if err != nil {
		failure = cmp.Or(truncate(err.Error()), "task failed")
	} else {
		failure = ""
	}
}

var errResultTooLarge = newError(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("result is larger than %d bytes", maxTaskResult))

func encodeResult(result any) (json.RawMessage, error) {
	encoded, err := json.Marshal(result)
	if err != nil {
		return nil, errors.New("result has no JSON form")
	}
	if len(encoded) > maxTaskResult {
		return nil, errResultTooLarge
	}
	return encoded, nil
}

// progress is how the work of a task reports on itself. It may be used by
// several goroutines.
type progress struct {
	s *TaskService
	t *task
}

// Report tells the followers how far the task is: value from 0 to 1, never
// less than before, and a text of at most 8 KiB, beyond which it is cut.
// After the end of the task it does nothing.
func (p *progress) Report(text string, value float64) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	if !p.t.status.finished() {
		p.s.reportLocked(p.t, truncate(text), value)
	}
}

func (s *TaskService) reportLocked(t *task, text string, value float64) (n uint64) {
	if value > t.value { // which NaN is not
		t.value = min(value, 1)
	}
	return s.emitLocked(t, "progress_update", struct {
		Text  string  `json:"text"`
		Value float64 `json:"value"`
	}{text, t.value}, false)
}

// emitLocked appends an event to the task's outbox.
func (s *TaskService) emitLocked(t *task, eventType string, data any, keep bool) (n uint64) {
	return t.outbox.Append(string(marshal(struct {
		EventType string    `json:"event_type"`
		TaskID    string    `json:"task_id"`
		Timestamp time.Time `json:"timestamp"`
		Data      any       `json:"data"`
	}{eventType, t.id, time.Now().UTC(), data})), keep)
}

// finishLocked ends a task, unless it has ended: whoever comes first decides
// how. It returns the number of the terminal event, or 0.
func (s *TaskService) finishLocked(t *task, status taskStatus, result json.RawMessage, failure string) (n uint64) {
	if t.status.finished() {
		return 0
	}
	if t.kind == externalTask {
		s.outside--
	}
	if t.status == taskPending {
		s.queue = slices.DeleteFunc(s.queue, func(other *task) bool { return other == t })
	}
	t.status, t.end, t.result, t.err = status, time.Now(), result, failure
	var data any
	switch status {
	case taskCompleted:
		data = result
	case taskFailed:
		data = map[string]string{"error": failure}
	}
	eventType := "task_" + string(status)
	n = s.emitLocked(t, eventType, data, true)
	t.outbox.End(eventType)
	if t.deadline != nil {
		t.deadline.Stop()
	}
	if t.cancel != nil {
		t.cancel()
	}
	var seconds float64
	if !t.start.IsZero() {
		seconds = t.end.Sub(t.start).Seconds()
	}
	s.met.RecordTask(t.kind, string(status), seconds)
	t.deadline = time.AfterFunc(s.cfg.remember, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tasks[t.id] == t {
			s.forgetLocked(t)
		}
	})
	return n
}

// Cancel ends a task that has not ended. Its work is told by its context; an
// external worker by the answer to its next report.
func (s *TaskService) Cancel(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	if t == nil {
		return errTaskUnknown
	}
	if s.finishLocked(t, taskCancelled, nil, "") == 0 {
		return errCannotCancel
	}
	return nil
}

// Delete forgets a finished task before its time.
func (s *TaskService) Delete(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	switch {
	case t == nil:
		return errTaskUnknown
	case !t.status.finished():
		return errCannotDelete
	}
	s.forgetLocked(t)
	return nil
}

func (s *TaskService) forgetLocked(t *task) {
	delete(s.tasks, t.id)
	t.deadline.Stop() // it holds the task
}

// Progress, Complete and Fail are the reports of an external worker. They
// return the ID of the event that tells the followers.
func (s *TaskService) Progress(id, text string, value float64) (eventID string, err error) {
	return s.report(id, func(t *task) uint64 { return s.reportLocked(t, text, value) })
}

func (s *TaskService) Complete(id string, result json.RawMessage) (eventID string, err error) {
	return s.report(id, func(t *task) uint64 { return s.finishLocked(t, taskCompleted, result, "") })
}

func (s *TaskService) Fail(id, failure string) (eventID string, err error) {
	return s.report(id, func(t *task) uint64 { return s.finishLocked(t, taskFailed, nil, failure) })
}

// report applies a report to a running external task, under mu.
func (s *TaskService) report(id string, apply func(*task) uint64) (eventID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	switch {
	case t == nil:
		return "", errTaskUnknown
	case t.kind != externalTask:
		return "", errNotExternal
	case t.status == taskCancelled:
		return "", errTaskCancelled
	case t.status.finished():
		return "", errTaskFinished
	}
	t.seen = time.Now()
	t.deadline.Reset(s.cfg.timeout)
	return t.outbox.id(apply(t)), nil
}

// Close takes no more tasks and fails those that have not ended.
func (s *TaskService) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	s.queue = nil // at once, not one by one
	for _, t := range s.tasks {
		s.finishLocked(t, taskFailed, nil, "server is shutting down")
	}
}

// Counts returns how many tasks have each status.
func (s *TaskService) Counts() map[string]float64 {
	n := map[string]float64{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		n[string(t.status)]++
	}
	return n
}

// Events returns how many events the outboxes of all tasks hold.
func (s *TaskService) Events() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		kept, _, _ := t.outbox.Size()
		n += kept
	}
	return n
}

// Status returns one task.
func (s *TaskService) Status(id string) (taskView, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	if t == nil {
		return taskView{}, errTaskUnknown
	}
	return t.viewLocked(), nil
}

// List returns the newest tasks, newest first.
func (s *TaskService) List() []taskView {
	s.mu.Lock()
	defer s.mu.Unlock()
	tasks := slices.SortedFunc(maps.Values(s.tasks), func(a, b *task) int { return cmp.Compare(b.number, a.number) })
	views := []taskView{}
	for _, t := range tasks[:min(len(tasks), maxTaskList)] {
		views = append(views, t.viewLocked())
	}
	return views
}

// truncate cuts a text to maxTaskText bytes, and leaves out what is not UTF-8,
// such as half a character at the end.
func truncate(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxTaskText)], "")
}

// HTTP
